# The worker as an image. Run it with the engine's socket and the data directory mounted:
#   docker run -v /var/lib/jobfetcher:/data -v /var/run/docker.sock:/var/run/docker.sock -v $PWD/.env:/app/.env:ro IMAGE
# BASE_IMAGE is any image with python3 >= 3.11 and its venv module. Proxies and certificates of a builder's network belong
# into that image, not here. A tag may be moved by whoever owns it, so a release names its base by digest:
# scripts/image-release builds nothing from a tag, and says how to put the digest here.
ARG BASE_IMAGE=python:3.12-slim

FROM ${BASE_IMAGE} AS build
WORKDIR /src
# pip and what builds the package live in a venv of their own, so that the one that is shipped has none of it
RUN python3 -m venv /tools && python3 -m venv --without-pip /opt/jobfetcher && mkdir /made
COPY requirements/build.txt requirements/worker.txt requirements/
# Each file has one of the hashes of its lock file, or there is no image. Only wheels: the build of a source would fetch
# tools that no lock file names. worker.txt has the extra `signing`, which JOB_SIGNING_KEYS needs.
RUN /tools/bin/pip install --no-cache-dir --require-hashes --only-binary :all: --requirement requirements/build.txt \
 && /tools/bin/pip --python /opt/jobfetcher/bin/python install --no-cache-dir --require-hashes --only-binary :all: \
    --requirement requirements/worker.txt --report /made/worker.json
COPY pyproject.toml README.md ./
COPY jobfetcher jobfetcher
COPY mock_api mock_api
RUN /tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /made . \
 && /tools/bin/pip --python /opt/jobfetcher/bin/python install --no-index --no-deps --report /made/jobfetcher.json \
    /made/*.whl
COPY scripts/sbom.py scripts/
RUN /tools/bin/python scripts/sbom.py jobfetcher /opt/jobfetcher/lib/python3*/site-packages /made/*.json \
    >/made/sbom.cdx.json
# A user who is nobody else on the host; without a password or a shell
RUN echo 'jobfetcher:x:10001:10001::/home/jobfetcher:/usr/sbin/nologin' >>/etc/passwd \
 && echo 'jobfetcher:x:10001:' >>/etc/group \
 && mkdir /made/home

FROM ${BASE_IMAGE}
ARG BASE_IMAGE
LABEL org.opencontainers.image.title="jobfetcher" \
      org.opencontainers.image.description="A pull-based worker for container jobs" \
      org.opencontainers.image.base.name="${BASE_IMAGE}" \
      jobfetcher-image.sbom="/usr/share/jobfetcher/sbom.cdx.json"
COPY --from=build /etc/passwd /etc/group /etc/
COPY --from=build --chown=10001:10001 /made/home /home/jobfetcher
COPY --from=build /opt/jobfetcher /opt/jobfetcher
COPY --from=build /made/sbom.cdx.json /usr/share/jobfetcher/
ENV PATH=/opt/jobfetcher/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    JOBFETCHER_DEFAULT_PATH_BASE=/data
# the worker reads .env from here when one is mounted
WORKDIR /app
# Root: the worker talks to the engine's socket, which belongs to root on the host under a group id that differs from host to
# host. Whoever may use that socket is root on the host anyway, but a worker that is no root in its container cannot write
# elsewhere by mistake; where a group owns the socket: docker run --user jobfetcher --group-add GROUP_ID (README.md)
ENTRYPOINT ["jobfetcher"]
CMD ["run"]
