# The GPU side: one Celery worker with one model. Speaks no DICOM over a network: no pynetdicom, no highdicom.
# Build from the project's folder: docker build -f compose/worker.Dockerfile .
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
FROM ${CUDA_IMAGE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1 \
    HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 \
    MEDPRUNER_CONFIG=/etc/medpruner/config.toml HOME=/tmp PATH=/opt/venv/bin:$PATH
WORKDIR /app
RUN python3 -m venv /opt/venv

# Of the service only what both programs share.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service/__init__.py ./service/__init__.py
COPY service/shared ./service/shared
COPY workers ./workers
RUN pip install -c constraints.txt -e '.[worker]' && python -m compileall -q service workers

RUN groupadd --gid 10001 medpruner \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin medpruner \
    && install -d -m 0700 -o medpruner -g medpruner /data
USER 10001:10001
VOLUME ["/data"]

# Is the queue there? That a worker does its work is seen in the database: `status` names the oldest unfinished study.
HEALTHCHECK --interval=60s --timeout=20s --start-period=300s \
    CMD ["python", "-c", "import os, redis; redis.from_url(os.environ['MEDPRUNER__QUEUE__URL']).ping()"]
CMD ["python", "-m", "workers", "worker"]
