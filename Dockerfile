# guardrail serve. Build: docker build -t guardrail .
# Config: chmod 644 guardrail.toml, so that the image's user 10001 can read it.
# Run:   docker run -p 8000:8000 -v ./guardrail.toml:/etc/guardrail/guardrail.toml:ro guardrail
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md ./
COPY guardrail guardrail
RUN python -m venv /opt/guardrail \
    && /opt/guardrail/bin/pip install --no-cache-dir -c constraints.txt '.[cpu,server]'

FROM python:3.12-slim
RUN useradd --system --create-home --uid 10001 guardrail
COPY --from=build /opt/guardrail /opt/guardrail
ENV PATH=/opt/guardrail/bin:$PATH PYTHONUNBUFFERED=1
USER guardrail
WORKDIR /home/guardrail
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
# exec form: the server itself gets SIGTERM, and ends its streams well.
ENTRYPOINT ["guardrail", "serve", "--log", "json"]
# Beyond loopback a config with keys is needed (or allow_anonymous = true in it).
CMD ["--config", "/etc/guardrail/guardrail.toml", "--host", "0.0.0.0", "--port", "8000"]
