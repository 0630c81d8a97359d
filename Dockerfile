# docker build -t ema_jax .                                 # CPU
# docker build -t ema_jax --build-arg EXTRA=cuda .          # NVIDIA GPUs; run with --gpus=all
# docker run --rm -v "$PWD/runs:/runs" ema_jax run --config=tiny --workdir=/runs/tiny
FROM python:3.12-slim

# cpu, cuda, tpu or smollm2: jax's wheels bring CUDA themselves, so the base image stays the same.
ARG EXTRA=cpu

RUN pip install --no-cache-dir uv
WORKDIR /opt/ema_jax
COPY pyproject.toml uv.lock README.md LICENSE ./
COPY ema_jax ema_jax
COPY configs configs
ENV UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy
RUN if [ "$EXTRA" = cpu ]; then uv sync --locked --no-editable; \
    else uv sync --locked --no-editable --extra "$EXTRA"; fi

# Models, compiled programs and studies outlive the container where /runs is mounted.
ENV PATH=/opt/ema_jax/.venv/bin:$PATH HF_HOME=/runs/.cache/huggingface XDG_CACHE_HOME=/runs/.cache
RUN useradd --create-home ema && mkdir /runs && chown ema /runs
USER ema
WORKDIR /runs
VOLUME /runs
ENTRYPOINT ["ema-jax"]
CMD ["help"]
