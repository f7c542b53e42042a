# The program beside the PACS: receives, assembles, dispatches, reports, delivers. No torch, no GPU software.
# Build from the project's folder: docker build -f compose/service.Dockerfile .
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONSAFEPATH=1 PIP_NO_CACHE_DIR=1 \
    MEDPRUNER_CONFIG=/etc/medpruner/config.toml HOME=/tmp
WORKDIR /app

# For printed reports (companion "pdf"): scripts beyond Latin-1.
RUN apt-get update \
    && apt-get install -y --no-install-recommends fonts-dejavu-core fonts-droid-fallback fonts-noto-core \
    && rm -rf /var/lib/apt/lists/*

# An editable install: the migrations are found beside the packages.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service ./service
COPY migrations ./migrations
RUN pip install -c constraints.txt -e '.[service]' && python -m compileall -q service migrations

RUN groupadd --gid 10001 medpruner \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin medpruner \
    && install -d -m 0700 -o medpruner -g medpruner /data
USER 10001:10001
VOLUME ["/data"]
EXPOSE 11112

# Is the database there and of this version? The receiver, which needs none, has a check of its own in compose.yaml.
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s CMD ["python", "-m", "service", "status", "--json"]
CMD ["python", "-m", "service", "serve", "--no-worker"]
