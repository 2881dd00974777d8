# A server with a baked vault. The first stage freezes MODEL and has a compiler; the second has none and never compiles.
#
#   docker build --tag pipevault-server --build-arg MODEL=demo --build-arg SIZE=32x32 .
#
# Build it on the type of machine that serves: CPU type and THREADS are factors of the key. docs/howto/containers.md has more.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY src src
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt torch \
    && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt ".[server]"
ARG MODEL=demo
ARG SIZE=32x32
ARG BATCH_SIZE=1
ARG DTYPE=float32
ARG THREADS=1
ENV OMP_NUM_THREADS=${THREADS}
RUN /opt/venv/bin/pipevault prewarm "${MODEL}" --size "${SIZE}" --batch-size "${BATCH_SIZE}" --dtype "${DTYPE}" --dir /opt/vault \
    && /opt/venv/bin/pipevault verify --dir /opt/vault

FROM python:${PYTHON}-slim
ARG MODEL=demo
ARG THREADS=1
ENV OMP_NUM_THREADS=${THREADS} \
    PIPEVAULT_DIR=/opt/vault \
    PIPEVAULT_MODE=require \
    MODEL=${MODEL} \
    PATH=/opt/venv/bin:${PATH}
# The vault stays root's and the server may only read it: that is what makes its code trusted.
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/vault /opt/vault
COPY examples/server.py /opt/server.py
RUN useradd --system --uid 10001 --no-create-home server
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://localhost:8000/healthz')"]
# The shell gives its place to the server, so that SIGTERM reaches it.
CMD ["sh", "-c", "exec python /opt/server.py \"$MODEL\" --host 0.0.0.0 --workers 2 --threads 4"]
