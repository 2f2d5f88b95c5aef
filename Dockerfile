# Adder with all that it needs, for any user id: docs/running.md says how to run it.
#
#   docker build -t adder .                                                                          the CPU
#   docker build -t adder --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .           CUDA
#
# torch's CUDA wheels bring CUDA with them: the host needs NVIDIA's driver and container toolkit (`docker run --gpus all`).
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# Triton compiles a small launcher in C for each kernel; git, so that Snakemake can fetch a module of another workflow.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/adder
COPY envs/requirements.lock envs/requirements.lock
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "$(grep '^torch==' envs/requirements.lock)" \
    && pip install --no-cache-dir -r envs/requirements.lock
COPY LICENSE README.md pyproject.toml Snakefile ./
COPY config config
COPY envs envs
COPY profiles profiles
COPY rules rules
COPY workflow workflow
COPY workflow_scripts workflow_scripts
RUN pip install --no-cache-dir --no-deps --editable . \
    && python -m compileall -q workflow_scripts \
    && install -d -m 1777 /home/adder /work

# Snakemake wants a name and a home that can be written to, which a user id that nobody declared has not.
ENV HOME=/home/adder LOGNAME=adder
USER 1000
WORKDIR /work
ENTRYPOINT ["snakemake", "--snakefile", "/opt/adder/Snakefile", "--cores", "all"]
CMD ["merged_model"]
