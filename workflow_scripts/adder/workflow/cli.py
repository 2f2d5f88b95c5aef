"""The command `adder`, for what isn't a workflow: check a configuration, prune results, talk to a model, and others."""

import argparse
import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adder.core import file_lock
from adder.core.display.text import printable
from adder.core.errors import UserError, system_errors_told
from adder.core.file_digests import FileDigests
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.workflow import config_file, generated_docs, prune, run_folder, stage_graph
from adder.workflow.settings import merged
from adder.workflow.stage_runner import run_stage

DEFAULT_CONFIG = "config/config.yaml"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that `arguments` (default: the command line's) name; return its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        with system_errors_told():
            parsed.command(parsed)
    except UserError as error:
        print(printable(f"adder: {error}"), file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adder", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, action: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text}.")
        added.set_defaults(command=action)
        return added

    def takes_files(of: argparse.ArgumentParser, text: str) -> None:
        of.add_argument("files", nargs="*", metavar="CONFIG.yaml", help=f"{text} (default: {DEFAULT_CONFIG})")

    def takes_model(of: argparse.ArgumentParser) -> None:
        of.add_argument("folder", type=Path, help="a run's folder, such as results/default, or any model directory")
        of.add_argument("--base", action="store_true", help="the run's base instead of the tuned model")

    layers = "configurations, each laid over the ones before, as snakemake's --configfile takes them"
    check = command("check", _check, "Look for mistakes in a configuration, and list its runs and stages")
    takes_files(check, layers)
    check.add_argument("--quiet", action="store_true", help="say nothing where nothing is wrong")
    check.add_argument("--read", action="store_true", help="only read the files: no setting is looked at")
    machine = command("machine", _machine, "Say which GPU and machine this is, what is used of it, and why not more")
    machine.add_argument(
        "--results", type=Path, default=Path("results"), help="whose trials to read (default: results)"
    )
    removal = command("prune", _prune, "List the stage folders that no run needs, and remove them")
    takes_files(removal, "configurations whose runs need what is kept")
    removal.add_argument("--yes", action="store_true", help="remove without asking")
    one = command("stage", _stage, "Run one stage in this process, for debugging, on what its parents left")
    one.add_argument("stage", help="the stage, as the report names it: train, evaluate_tuned, …")
    takes_files(one, layers)
    one.add_argument("--run", help="the run (default: the configuration's first)")
    one.add_argument("--out", type=Path, default=Path("stage-by-hand"), help="where to write (default: %(default)s)")
    whole = command("verify", _verify, "Hold a run's folder against its record of what is in it")
    whole.add_argument("folder", type=Path, help="the folder, such as results/default")
    live = command("watch", _watch, "Show runs as they go on a page that renews itself, results/live.html")
    takes_files(live, layers)
    live.add_argument("--port", type=int, help="serve the page on this machine too; 0 for any free port")
    live.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="(default: %(default)g)")
    live.add_argument("--once", action="store_true", help="write it once")
    chat = command("chat", _chat, "Talk to a run's model at the terminal")
    takes_model(chat)
    chat.add_argument("--both", action="store_true", help="ask base and tuned model alike")
    chat.add_argument("--system", metavar="TEXT", help="the system prompt (default: the training's); '' for none")
    chat.add_argument("--tools", type=Path, metavar="FILE.json", help="tools that it may call, in OpenAI's form")
    chat.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    chat.add_argument("--max-new-tokens", type=int, default=1024, help="longest reply (default: %(default)s)")
    endpoint = command("serve", _serve, "Serve a run's model on this machine, as OpenAI's interface has it")
    takes_model(endpoint)
    endpoint.add_argument("--host", default="localhost", help="where to listen (default: %(default)s)")
    endpoint.add_argument("--port", type=int, default=8000, help="(default: %(default)s)")
    docs = command("document", _document, "Write what follows from the declarations into config/, docs/ and profiles/")
    docs.add_argument("--check", action="store_true", help="write nothing, and fail where something would change")
    return parser


def _layered(files: list[str]) -> dict[str, Any]:
    return functools.reduce(merged, map(config_file.read, files or [DEFAULT_CONFIG]))


def _tell(text: str) -> None:
    print(printable(f"adder: {text}"), file=sys.stderr)


def _check(parsed: argparse.Namespace) -> None:
    config = _layered(parsed.files)
    if parsed.read:
        return
    for run, (settings, stages) in stage_graph.runs_of(config, _tell).items():
        if parsed.quiet:
            continue
        results = Path(settings.runtime.results)
        done = [name for name, stage in stages.items() if (results / stage.folder / "stage.json").exists()]
        print(f"{run}: {len(stages)} stages, of which finished: {', '.join(done) or 'none'}")


def _machine(parsed: argparse.Namespace) -> None:
    from adder.core.machine import graphics_cards  # torch takes seconds, and the other commands need none of it
    from adder.kernels import card_support
    from adder.kernels.trials import decide, kept

    found = graphics_cards.look()
    print("\n".join(card_support.sentences(found)))
    for card in graphics_cards.alike(graphics_cards.usable(found)):
        for line in kept.told(parsed.results / decide.FOLDER, card.name):
            print(line)
        break


def _prune(parsed: argparse.Namespace) -> None:
    files = parsed.files or [DEFAULT_CONFIG]
    needed: dict[str, stage_graph.Stage] = {}
    directories = set()
    for file in files:
        for settings, stages in stage_graph.runs_of(config_file.read(file), _tell).values():
            directories.add(settings.runtime.results)
            for stage in stages.values():
                needed |= stage.family()
    if len(directories) != 1:
        raise UserError(f"the configurations write to different directories: {', '.join(sorted(directories))}")
    results = Path(directories.pop())
    if not results.exists():
        print(f"Nothing to prune: there is no {results}/.")
        return
    with _nobody_at_work(results):
        _remove_unneeded(results, needed, files, ask=not parsed.yes)


@contextlib.contextmanager
def _nobody_at_work(results: Path) -> Iterator[None]:
    """Keep everybody else from writing to `results`. Raises UserError, which names who does so already."""

    def busy(stage: Path, who: str) -> None:
        raise UserError(f"{who} is still at work on {stage}; wait for it, or end it")

    with contextlib.ExitStack() as locks:
        locks.enter_context(file_lock.take(results, "adder prune"))
        # A job may outlive its Snakemake. Lock files that killed jobs have left are gone afterwards.
        for file in sorted(results.glob("stages/*/.*.lock")):
            stage = file.with_name(file.stem.removeprefix("."))
            locks.enter_context(file_lock.held(file, functools.partial(busy, stage)))
        yield


def _remove_unneeded(results: Path, needed: dict[str, stage_graph.Stage], files: list[str], ask: bool) -> None:
    folders = prune.unneeded(results, needed)
    if not folders:
        print(f"Nothing to prune: every stage in {results}/ is needed by {', '.join(files)}.")
        return
    print("\n".join(map(str, folders)))
    megabytes = prune.freed_bytes(folders) / 1e6
    print(f"{len(folders)} folders, {megabytes:,.1f} MB, that no run of {', '.join(files)} needs.")
    if not ask or _confirmed():
        prune.remove(folders, FileDigests.of_results(results))
        print("Removed.")
    else:
        print("Nothing was removed.")


def _confirmed() -> bool:
    try:
        return input("Remove them? [y/N] ").strip().lower() in {"y", "yes"}
    except EOFError:  # nobody there to answer
        print()
        return False


def _stage(parsed: argparse.Namespace) -> None:
    graphs = stage_graph.runs_of(_layered(parsed.files), _tell)
    run = parsed.run or next(iter(graphs))
    if run not in graphs:
        raise UserError(f"--run {run}: there is no such run; there are {', '.join(graphs)}")
    settings, stages = graphs[run]
    if parsed.stage not in stages:
        raise UserError(f"{parsed.stage}: run {run} has no such stage; it has {', '.join(stages)}")
    stage, results = stages[parsed.stage], Path(settings.runtime.results)
    inputs = {name: results / parent.folder for name, parent in stage.parents.items()}
    missing = [name for name, folder in inputs.items() if not (folder / "stage.json").exists()]
    if missing:
        raise UserError(f"{parsed.stage}: not finished is what it reads, {', '.join(missing)}; run the workflow first")
    if parsed.out.exists() and any(parsed.out.iterdir()):
        raise UserError(f"--out {parsed.out}: has files in it already; name another folder")
    parsed.out.mkdir(parents=True, exist_ok=True)
    checkpoints = parsed.out / "checkpoints" if stage.spec.continued else None
    context = Context(Progress(stage.name), settings.runtime, results, checkpoints)
    summary = run_stage(stage.spec, stage.settings.model_dump(mode="json"), inputs, parsed.out, context)
    if checkpoints is not None:
        shutil.rmtree(checkpoints, ignore_errors=True)
    print(f"{parsed.stage}: written to {parsed.out}/: {summary}")


def _verify(parsed: argparse.Namespace) -> None:
    if problems := run_folder.verify(parsed.folder):
        raise UserError(f"{parsed.folder} is not as it was made:\n" + "\n".join(f"  - {line}" for line in problems))
    print(f"{parsed.folder}: every file is as it was made")


def _watch(parsed: argparse.Namespace) -> None:
    from adder.workflow import watch  # with plots

    if parsed.every <= 0:
        raise UserError("--every: must be above 0 seconds")
    graphs = stage_graph.runs_of(_layered(parsed.files), _tell)
    results = Path(next(iter(graphs.values())).settings.runtime.results)
    stages = {run: graph.stages for run, graph in graphs.items()}
    watch.watch(stages, results, parsed.every, parsed.port, print, parsed.once)


def _chat(parsed: argparse.Namespace) -> None:
    from adder.serving import chat, run_models  # with torch

    models = run_models.find(parsed.folder)
    if parsed.system is not None:
        models = dataclasses.replace(models, system_prompt=parsed.system or None)
    if parsed.temperature < 0 or parsed.max_new_tokens < 1:
        raise UserError("--temperature must not be below 0, and --max-new-tokens not below 1")
    tools = chat.read_tools(parsed.tools) if parsed.tools else []
    which: chat.Which = "both" if parsed.both else "base" if parsed.base else "tuned"
    opened = chat.open_chat(models, which, chat.Settings(parsed.temperature, parsed.max_new_tokens), sys.stdout)
    opened.tools = tools
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (input() then edits lines and remembers them)

        print("/help lists commands, Ctrl-D ends.", file=sys.stderr)
    chat.talk(opened, functools.partial(input, "> " if interactive else ""), interactive)


def _serve(parsed: argparse.Namespace) -> None:
    from adder.serving import endpoint, run_models

    models = run_models.find(parsed.folder)
    if parsed.base and models.base is None:
        raise UserError(f"{parsed.folder}: what it was made from isn't known here; serve the base by its own directory")
    folder = models.base if parsed.base and models.base else models.tuned
    print(endpoint.how_to_ask(folder, parsed.host, parsed.port, models.system_prompt), flush=True)
    endpoint.serve(folder, parsed.host, parsed.port)


def _document(parsed: argparse.Namespace) -> None:
    wanted = generated_docs.documents(Path.cwd())
    changed = {path: text for path, text in wanted.items() if path.read_text(encoding="utf-8") != text}
    if parsed.check and changed:
        raise UserError(f"{', '.join(map(str, changed))}: not as the declarations say; run `make settings`")
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
