// The page is written anew while runs go on; the browser keeps the place that is being read.
setTimeout(() => location.reload(), 5000);
