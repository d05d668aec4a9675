# The service, its dependencies and the models in models/:
#
#   docker build -t capsnet .                           for any machine
#   docker build -t capsnet --build-arg RUNTIME=gpu .   for NVIDIA GPUs, run with `--gpus all`
#   docker build -t capsnet --build-arg EXTRAS=grpc,otel .   with gRPC and traces
#
# Plain instructions only, without cache mounts: the classic builder and BuildKit both make it, and neither fetches
# anything but the base image, the pinned packages and, for a GPU, the libraries of NVIDIA's that these ask for.
ARG BASE=python:3.13-slim

FROM ${BASE} AS dependencies
ARG RUNTIME=cpu
ARG EXTRAS=
WORKDIR /build
# The environment has no pip of its own: the base image's fills it.
RUN python -m venv --without-pip /opt/capsnet
COPY pyproject.toml constraints.txt ./
# The project without its code: metadata and dependencies, in a layer that outlives every change of the code.
RUN case "$RUNTIME" in cpu | gpu) ;; *) echo "RUNTIME is '$RUNTIME', expected cpu or gpu" >&2; exit 1 ;; esac; \
    pip --python /opt/capsnet/bin/python install --no-cache-dir --no-compile --constraint constraints.txt ".[$RUNTIME${EXTRAS:+,$EXTRAS}]"
# More than a quarter of what was installed is never opened here: the packages' own tests and type stubs, what others
# compile against NumPy with, the tools with which ONNX Runtime edits models, its second copy of itself, for C
# programs, Pillow's decoder for AVIF, which the service does not take, and our commands, since the code runs from /app.
# The rest is compiled now, since the running container cannot write; unchecked, since nobody edits it any more.
RUN rm /opt/capsnet/bin/capsnet* && cd /opt/capsnet/lib/python3*/site-packages \
    && rm -rf onnxruntime/backend onnxruntime/datasets onnxruntime/quantization onnxruntime/tools \
        onnxruntime/transformers onnxruntime/capi/libonnxruntime.so* numpy/f2py numpy/_core/include \
        PIL/_avif.* pillow.libs/libavif-* \
    && find . -depth \( -type d -name tests -o -name '*.py[ix]' -o -name '*.pxd' -o -name '*.a' \) -exec rm -rf {} + \
    && python -m compileall -q -j 0 --invalidation-mode unchecked-hash .

FROM ${BASE} AS code
COPY service /app/service
COPY models /models
# Readable for the user below, whatever the umask of the checkout.
RUN chmod -R u=rwX,go=rX /app /models \
    && python -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${BASE}
COPY --from=dependencies /opt/capsnet /opt/capsnet
COPY --from=code /app /app
COPY --from=code /models /models

# ONNX Runtime's packages report their use to Microsoft unless told not to before they are imported. The tunable has
# glibc ask Linux for large pages.
ENV PATH=/opt/capsnet/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \
    CAPSNET_HOST=0.0.0.0 \
    CAPSNET_PORT=8000 \
    CAPSNET_MODELS=/models
WORKDIR /app
# A number, because Kubernetes' runAsNonRoot cannot judge a name. The user owns nothing and needs no home.
USER 65532:65532
EXPOSE 8000
# http.client and not urllib.request, which would send this through a proxy that the engine sets in the environment.
# It knows the environment alone: in here the port comes by CAPSNET_PORT, and keys by CAPSNET_API_KEYS, not by options.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-c", "\
import http.client, os, sys; \
connection = http.client.HTTPConnection('127.0.0.1', int(os.environ['CAPSNET_PORT']), timeout=4); \
keys = [key.strip() for key in os.environ.get('CAPSNET_API_KEYS', '').split(',') if key.strip()]; \
connection.request('GET', '/readyz', headers={'X-API-Key': keys[0].encode()} if keys else {}); \
sys.exit(connection.getresponse().status != 200)"]
# The server itself is process 1 and gets SIGTERM; what follows the image's name on the command line are its options.
ENTRYPOINT ["python", "-m", "service.main"]

ARG REVISION=unknown
LABEL org.opencontainers.image.title="capsnet" \
    org.opencontainers.image.description="Serves capsule networks over HTTP" \
    org.opencontainers.image.revision="${REVISION}"
