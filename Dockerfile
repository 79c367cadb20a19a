# A GPU box for posttrain: CUDA torch, the extras, the toolchains of the rewards, llama.cpp, screen.
#
#     docker build -t posttrain .
#     docker run --gpus all -it -e HF_TOKEN -v /volume:/workspace posttrain posttrain start tui
#
# Never built so far: where it was written there was no Docker. tests/host/test_dockerfile.py checks what it names.
FROM node:22-bookworm-slim AS node

FROM python:3.11-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 DEBIAN_FRONTEND=noninteractive

# Triton's launchers need a C compiler, detached runs screen or tmux, checked code cargo, clippy, Go and node.
RUN apt-get update && apt-get install -y --no-install-recommends \
        ca-certificates cargo gcc git golang-go libc6-dev rust-clippy screen tmux \
    && rm -rf /var/lib/apt/lists/*
COPY --from=node /usr/local/bin/node /usr/local/bin/node
COPY --from=node /usr/local/lib/node_modules /usr/local/lib/node_modules
ENV POSTTRAIN_NODE_TOOLS=/opt/node POSTTRAIN_NODE_MODULES=/opt/node/node_modules
RUN ln -s ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm && npm install --prefix /opt/node --no-fund --no-audit \
        node-llama-cpp@3.22.1 typescript@6.0.3 eslint@10.15.0 typescript-eslint@8.73.0

# The index of Python packages has torch for CUDA under the version that the constraints pin.
WORKDIR /opt/posttrain
COPY pyproject.toml constraints.txt README.md ./
COPY posttrain ./posttrain
RUN pip install -c constraints.txt ".[cuda,code,serve,track]" peft

# Runs, caches and temporary files belong on the volume that outlives the container.
WORKDIR /workspace
VOLUME /workspace
CMD ["posttrain", "doctor", "tui"]
