# dpo_fast on NVIDIA GPUs. From the repository's root:
#   docker build -f docker/cuda.Dockerfile -t dpo-fast:cuda .
#   docker run --rm --gpus all --ipc host -v $PWD:/work dpo-fast:cuda doctor run.yaml --nproc 8
# Another CUDA than that of pip's PyTorch: --build-arg CUDA=12.8.1 --build-arg TORCH=URL, a wheel that PyTorch's
# installation page leads to.
ARG CUDA=13.0.1

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY dpo_fast dpo_fast
COPY kernels kernels
COPY csrc csrc
COPY configs configs
COPY recipes recipes
RUN pip install --no-cache-dir build && python -m build --wheel -o /dist .

# The devel image has nvcc, with which DeepSpeed and csrc build what they need on first use.
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04
ARG TORCH=torch
ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PATH=/opt/dpo-fast/bin:$PATH
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-dev python3-venv g++ ninja-build libaio-dev \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/dpo-fast
COPY constraints.txt /tmp/constraints.txt
RUN pip install --constraint /tmp/constraints.txt "${TORCH}"
COPY --from=wheel /dist/*.whl /tmp/
RUN pip install --constraint /tmp/constraints.txt "$(ls /tmp/dpo_fast-*.whl)[train,liger]" && rm /tmp/*.whl
# Caches of models, of tokenised rows and of compiled kernels: mount a volume there to keep them.
ENV HF_HOME=/cache/huggingface TRITON_CACHE_DIR=/cache/triton TORCH_EXTENSIONS_DIR=/cache/extensions
RUN useradd --create-home --uid 10001 trainer && mkdir -p /cache /work && chown trainer /cache /work
USER trainer
WORKDIR /work
ENTRYPOINT ["dpo-fast"]
CMD ["--help"]
