# The worker as an image. Run it with the engine's socket and the data directory mounted:
#   docker run -v HOST_DIR:/data -v /var/run/docker.sock:/var/run/docker.sock -v $PWD/.env:/app/.env:ro IMAGE
# BASE_IMAGE is any image with python3 >= 3.11 and its venv module. Proxies and certificates of a builder's network belong
# into that image, not here.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
# pip lives in a venv of its own, so that the one that is shipped has none
RUN python3 -m venv /pip && python3 -m venv --without-pip /opt/jobfetcher
COPY pyproject.toml constraints.txt README.md ./
COPY jobfetcher jobfetcher
COPY mock_api mock_api
# the extra `signing` is what JOB_SIGNING_KEYS needs
RUN /pip/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist . \
 && /pip/bin/pip --python /opt/jobfetcher/bin/python install --no-cache-dir --constraint constraints.txt \
    "$(echo /dist/*.whl)[signing]"

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="jobfetcher" \
      org.opencontainers.image.description="A pull-based worker for container jobs"
COPY --from=build /opt/jobfetcher /opt/jobfetcher
ENV PATH=/opt/jobfetcher/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    JOBFETCHER_DEFAULT_PATH_BASE=/data
# the worker reads .env from here when one is mounted
WORKDIR /app
# Root: the worker talks to the engine's socket, which belongs to root on the host under a group id that differs from host to
# host. Whoever may use that socket is root on the host anyway, so another user here would protect nothing.
ENTRYPOINT ["jobfetcher"]
CMD ["run"]
