# dpoeng on NVIDIA GPUs; the host needs driver 580 or newer and NVIDIA's container toolkit (docs/requirements.md).
#
#   docker build -t dpoeng .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/data" -v "$HOME/.cache:/cache" dpoeng train --cache refcache
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc and Python's headers: triton compiles its launchers with them. torch brings CUDA's own libraries.
# Ubuntu keeps only the newest version of a package, so none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/dpoeng/bin:$PATH XDG_CACHE_HOME=/cache HF_HOME=/cache/huggingface PIP_NO_CACHE_DIR=1

# torch first and in a layer of its own: it is the largest by far, and a change of dpoeng leaves it alone.
COPY constraints.txt /src/
RUN python3 -m venv /opt/dpoeng && pip install -c /src/constraints.txt torch

COPY . /src
RUN pip install -c /src/constraints.txt /src && dpoeng --version

WORKDIR /data
ENTRYPOINT ["dpoeng"]
CMD ["--help"]
