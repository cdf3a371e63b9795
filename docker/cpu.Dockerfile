# dpo_fast without a GPU: to try it, to look at data, and for tests. From the repository's root:
#   docker build -f docker/cpu.Dockerfile -t dpo-fast:cpu .
#   docker run --rm -v $PWD:/work dpo-fast:cpu data run.yaml
# pip may take a PyTorch with gigabytes of CUDA libraries. For a small image name the wheel of a CPU build, from
# PyTorch's installation page: --build-arg TORCH=URL
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY dpo_fast dpo_fast
COPY kernels kernels
COPY csrc csrc
COPY configs configs
COPY recipes recipes
RUN pip install --no-cache-dir build && python -m build --wheel -o /dist .

FROM python:3.12-slim-bookworm
ENV PIP_NO_CACHE_DIR=1 DS_ACCELERATOR=cpu
# A compiler, for what torch and DeepSpeed build on first use.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ ninja-build libaio-dev \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
ARG TORCH=torch
RUN pip install --constraint /tmp/constraints.txt "${TORCH}"
COPY --from=wheel /dist/*.whl /tmp/
RUN pip install --constraint /tmp/constraints.txt "$(ls /tmp/dpo_fast-*.whl)[train]" && rm /tmp/*.whl
ENV HF_HOME=/cache/huggingface TORCH_EXTENSIONS_DIR=/cache/extensions
RUN useradd --create-home --uid 10001 trainer && mkdir -p /cache /work && chown trainer /cache /work
USER trainer
WORKDIR /work
ENTRYPOINT ["dpo-fast"]
CMD ["--help"]
