# The GPU image: NVIDIA's PyTorch image (which has torch, CUDA, NCCL and Transformer Engine) + megatron-core + this package.
# Written from the releases' documentation; NOT YET BUILT, nor run on a GPU machine.
#   docker build -t megatron_mm1 .
#   docker run --rm --gpus all --ipc=host megatron_mm1 mm1 train --help

# 26.03: torch 2.11, CUDA 13.2, Python 3.12.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3
FROM ${BASE}

# apex is on no registry. megatron-core uses one kernel of it, for gradient_accumulation_fusion.
ARG APEX_REVISION=6424da3b4faa6c8f062da4a48c424fff3f02d42d
ARG TORCH_CUDA_ARCH_LIST=9.0
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=8 \
    pip install --no-cache-dir --no-build-isolation --no-deps \
    "apex @ git+https://github.com/NVIDIA/apex@${APEX_REVISION}"

WORKDIR /workspace/megatron_mm1

# What the image has stays as it is (its torch is its own build); the rest comes from the lock. Every install is
# without dependencies, so the image's pip constraints, which would also bind the build of this package, are lifted.
ENV PIP_CONSTRAINT=""
COPY requirements.lock ./
RUN python -c "import importlib.metadata as m, re; \
    have = {re.sub('[-_.]+', '-', d.name).lower() for d in m.distributions()}; \
    print(*(x for x in open('requirements.lock') if x[0] != '#' and x.split('==')[0] not in have), sep='')" \
    > /tmp/missing.txt \
    && pip install --no-cache-dir --no-deps -r /tmp/missing.txt \
    && rm /tmp/missing.txt

COPY . .
RUN pip install --no-cache-dir --no-deps . \
    && python -c "import megatron.core, nvidia.dali, transformer_engine.pytorch, megatron_mm1" \
    && useradd --create-home --uid 10001 mm1 \
    && chown -R 10001 .

USER 10001
CMD ["mm1", "--help"]
