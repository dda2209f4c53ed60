# megatron_mm1 on NVIDIA's PyTorch image, which brings torch, CUDA, cuDNN and NCCL; added are Transformer Engine, apex,
# megatron-core, DALI, sentencepiece and this package. docs/install.md says what of it has been run, and where.
#
#   docker build -t megatron_mm1 --target runtime .    to train with
#   docker build -t megatron_mm1:test .                the same with the tests and what they need
#   docker run --rm --gpus all --ipc=host megatron_mm1 mm1 doctor

# 26.03: torch 2.11, CUDA 13.2, Python 3.12.
ARG BASE=nvcr.io/nvidia/pytorch:26.03-py3

# What has to be compiled against the image's torch. An empty version leaves it out, as on a machine without CUDA.
FROM ${BASE} AS kernels
# The image's constraints would also bind what is built here.
ENV PIP_CONSTRAINT=""
ARG TORCH_CUDA_ARCH_LIST=9.0
ARG MAX_JOBS=8
RUN mkdir /wheels
# Of apex megatron-core uses one kernel, for gradient_accumulation_fusion. It is on no registry.
ARG APEX_REVISION=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN if [ -n "$APEX_REVISION" ]; then \
      APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD="$MAX_JOBS" \
      pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels \
        "apex @ git+https://github.com/NVIDIA/apex@$APEX_REVISION"; \
    fi
# The FP8 recipes are written against this release. Its other requirements the image has for its own, older one.
ARG TRANSFORMER_ENGINE=2.20.2
RUN if [ -n "$TRANSFORMER_ENGINE" ]; then \
      pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels \
        "transformer-engine==$TRANSFORMER_ENGINE" "transformer-engine-cu13==$TRANSFORMER_ENGINE" \
        "transformer-engine-torch==$TRANSFORMER_ENGINE" nvidia-cudnn-frontend==1.32.0 nvdlfw-inspect==0.2.2; \
    fi

FROM ${BASE} AS package
ENV PIP_CONSTRAINT=""
WORKDIR /source
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE} AS runtime
ENV PIP_CONSTRAINT=""
# What the image has stays as it is, above all its own build of torch; the rest comes from the lock.
WORKDIR /workspace/megatron_mm1
COPY pyproject.toml requirements.lock ./
COPY tools/image_pins.py tools/
RUN --mount=type=cache,target=/root/.cache/pip \
    python tools/image_pins.py > /tmp/pins.txt \
    && pip install --no-deps -r /tmp/pins.txt \
    && rm /tmp/pins.txt
RUN --mount=type=bind,from=kernels,source=/wheels,target=/wheels \
    find /wheels -name '*.whl' -exec pip install --no-cache-dir {} +
RUN useradd --create-home --no-log-init --uid 10001 mm1 && chown mm1: .
COPY --from=package /wheels /opt/megatron_mm1
RUN pip install --no-cache-dir --no-deps /opt/megatron_mm1/*.whl \
    && python -c "import megatron.core, nvidia.dali.fn, sentencepiece, megatron_mm1.cli"
COPY README.md LICENSE NOTICE ./
COPY examples examples
USER 10001
CMD ["mm1", "--help"]

FROM runtime AS test
USER 0
RUN --mount=type=cache,target=/root/.cache/pip \
    python tools/image_pins.py --extras > /tmp/pins.txt \
    && pip install --no-deps -r /tmp/pins.txt \
    && rm /tmp/pins.txt
COPY tools tools
COPY tests tests
USER 10001
CMD ["pytest", "-q", "-m", "not slow and not gpu and not demo", "tests/unit", "tests/parallel"]
