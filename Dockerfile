# One image for api, worker and scheduler; `piecework <part>` says which. On a machine with NVIDIA's container toolkit
# the worker finds the GPU: torch brings the CUDA libraries that it needs, and the driver comes from the machine.
FROM python:3.11.13-slim-bookworm

ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/piecework

# What we need changes seldom and weighs most, so it is a layer of its own.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY api api
COPY jobs jobs
COPY worker worker
COPY storage storage
COPY billing billing
RUN pip install --no-deps .

# Volumes take the owner of the directory that they cover.
RUN useradd --system --uid 10001 --create-home piecework \
    && install -d -o piecework -g piecework /var/lib/piecework /var/cache/piecework
USER piecework
WORKDIR /var/lib/piecework
ENV PIECEWORK_DATA_DIR=/var/lib/piecework \
    PIECEWORK_CACHE_DIR=/var/cache/piecework \
    PIECEWORK_HOST=0.0.0.0 \
    PIECEWORK_PORT=8787

EXPOSE 8787
ENTRYPOINT ["piecework"]
CMD ["--help"]
