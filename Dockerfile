# One image per service: `docker build --target order-service .`; docker-compose.yml builds all four.
# Nothing here needs BuildKit, so that docker-compose 1.29 and older engines build it too. `.ci/pin-images` pins the images.

# The workspace with its sources emptied. This stage runs after every change, but what it leaves in /skeleton changes
# only with a manifest or Cargo.lock, and the next stage is cached by that content.
FROM rust:1.95-slim-bookworm AS skeleton
WORKDIR /workspace
COPY . .
RUN for member in bench chaos harness testkit; do mkdir -p "$member/src" && touch "$member/src/lib.rs"; done \
    && mkdir /skeleton \
    && cp --parents .cargo/config.toml Cargo.* */Cargo.toml */build.rs */src/lib.rs */src/main.rs /skeleton \
    && cd /skeleton \
    && for source in */build.rs */src/*.rs; do echo 'fn main() {}' >"$source"; done

# All four binaries come from one build, so that they share their dependencies and no target compiles them again.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /workspace
# Writes the list of crates into each binary, so that whoever has no more than the image can look for vulnerable ones.
RUN cargo install --locked --version =0.7.7 cargo-auditable
ENV BUILD="cargo auditable build --locked --release -p order-service -p outbox-relay -p inventory-service -p loyalty-service"
COPY --from=skeleton /skeleton .
# The dependencies, in a layer of their own. What became of the empty crates is removed: a checkout's files are often
# older than this layer, and cargo, which goes by time, would take the empty crates for up to date.
RUN $BUILD && cargo clean --release --workspace
COPY . .
RUN $BUILD

# No shell and no packages: libc, CA certificates and the user nonroot, whom the processes run as. The user is named here too,
# so that no later image makes them root, and by number, so that Kubernetes can tell.
FROM gcr.io/distroless/cc-debian12:nonroot AS runtime
USER 65532:65532
LABEL org.opencontainers.image.licenses="MIT OR Apache-2.0"

FROM runtime AS order-service
LABEL org.opencontainers.image.title="order-service" \
      org.opencontainers.image.description="Commits an order and its event in one transaction"
COPY --from=build /workspace/target/release/order-service /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/order-service"]
CMD ["serve"]
EXPOSE 50051 52051

FROM runtime AS outbox-relay
LABEL org.opencontainers.image.title="outbox-relay" \
      org.opencontainers.image.description="Leases outbox rows and delivers them over gRPC to any EventReceiver"
COPY --from=build /workspace/target/release/outbox-relay /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/outbox-relay"]
CMD ["serve"]
EXPOSE 50053

FROM runtime AS inventory-service
LABEL org.opencontainers.image.title="inventory-service" \
      org.opencontainers.image.description="Applies each order event once and deducts stock in the same transaction"
COPY --from=build /workspace/target/release/inventory-service /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/inventory-service"]
CMD ["serve"]
EXPOSE 50052 52052

FROM runtime AS loyalty-service
LABEL org.opencontainers.image.title="loyalty-service" \
      org.opencontainers.image.description="Gives customers points for their orders: applies each order event once"
COPY --from=build /workspace/target/release/loyalty-service /usr/local/bin/
ENTRYPOINT ["/usr/local/bin/loyalty-service"]
CMD ["serve"]
EXPOSE 50055 52055
