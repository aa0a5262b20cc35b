# Two images. The default one measures on CPUs; `--target cuda` measures on NVIDIA GPUs too.
#
#   docker build -t quantbench .
#   docker run --rm quantbench --model-id smollm2-135m
#   docker build -t quantbench:cuda --target cuda .
#   docker run --rm --gpus all -v "$HOME/.cache/huggingface:/hub" quantbench:cuda --model-id microsoft/phi-2
#
# Models from the hub go to /hub; results are written where a volume is mounted, as in `-v "$PWD:/work"`.
ARG RUST=1.95
ARG CUDA=13.0.1

FROM rust:${RUST}-slim-bookworm AS build
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*
COPY . .
RUN cargo build --release --locked && strip -o /quantbench target/release/quantbench

FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build-cuda
ARG RUST
WORKDIR /src
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ libc6-dev git && rm -rf /var/lib/apt/lists/*
COPY --from=build /usr/local/cargo /usr/local/cargo
COPY --from=build /usr/local/rustup /usr/local/rustup
ENV CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup PATH=/usr/local/cargo/bin:/usr/local/cuda/bin:$PATH
COPY . .
RUN cargo build --release --locked --features cuda && strip -o /quantbench target/release/quantbench

# The runtime image has cuBLAS and cuRAND; the driver comes from the host with `--gpus`.
FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04 AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /quantbench /usr/local/bin/quantbench
ENV HF_HOME=/hub
VOLUME /hub
WORKDIR /work
ENTRYPOINT ["quantbench"]

FROM debian:bookworm-slim AS cpu
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=build /quantbench /usr/local/bin/quantbench
ENV HF_HOME=/hub
VOLUME /hub
WORKDIR /work
ENTRYPOINT ["quantbench"]
