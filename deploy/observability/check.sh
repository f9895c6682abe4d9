#!/usr/bin/env bash
# Checks the rules, their tests, the configuration of Prometheus, the dashboard, and that both fit docker-compose.yml.
#
#   deploy/observability/check.sh
#
# It exits with 1 if something is wrong, and with 2 if promtool or python3 is missing.
set -euo pipefail
cd "$(dirname "$0")"
if ! command -v promtool >/dev/null; then
  echo 'check.sh: needs promtool. On Debian and Ubuntu: apt-get install --no-install-recommends prometheus' >&2
  exit 2
fi
if ! command -v python3 >/dev/null; then
  echo 'check.sh: needs python3. On Debian and Ubuntu: apt-get install python3' >&2
  exit 2
fi
promtool check rules rules.yml
promtool check config prometheus.yml
promtool test rules rules.test.yml slo.test.yml

# promtool parses expressions of rules only, so those of the dashboard become rules for a moment. A metric that was renamed
# breaks no syntax: each name has to be a string in the code.
python3 - <<'PYTHON'
import glob
import json
import re
import subprocess
import sys
import tempfile

faults = []
with open("dashboard.json", encoding="utf-8") as file:
    dashboard = json.load(file)
panels = dashboard["panels"]
expressions = []
for panel in panels:
    if panel["type"] == "row":
        continue
    title = panel["title"]
    if not panel.get("description") or not panel["fieldConfig"]["defaults"].get("unit"):
        faults.append(f"dashboard.json: {title}: has no description or no unit")
    expressions += [(title, target["expr"].replace("$__rate_interval", "5m")) for target in panel["targets"]]
for field in "id", "title":
    values = [panel[field] for panel in panels]
    faults += [f"dashboard.json: {field} {value!r} is there twice" for value in {v for v in values if values.count(v) > 1}]

for title, expression in expressions:
    # JSON is YAML.
    rule = {"groups": [{"name": "dashboard", "rules": [{"record": "parsed", "expr": expression}]}]}
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        json.dump(rule, file)
        file.flush()
        checked = subprocess.run(["promtool", "check", "rules", file.name], capture_output=True, text=True)
    if checked.returncode != 0:
        faults.append(f"dashboard.json: {title}: {expression}\n{checked.stderr.strip()}")

with open("rules.yml", encoding="utf-8") as file:
    rules = re.sub(r"^\s*#.*$", "", file.read(), flags=re.M)
# Labels are among them, such as rpc_method.
strings = set()
for path in glob.glob("../../*/src/**/*.rs", recursive=True):
    with open(path, encoding="utf-8") as file:
        strings.update(re.findall(r'"([a-z]\w+)"', file.read()))
recorded = set(re.findall(r"- record: (\S+)", rules))
names = re.compile(r"[a-z]\w*(?::\w+)+|\b(?:outbox|orders?|intake|inbox|rpc|db_client)_\w+\b")
for where, text in ("rules.yml", rules), ("dashboard.json", "\n".join(expression for _, expression in expressions)):
    # The times of a subquery, such as 5m:15s, look like a recorded name.
    for name in sorted(set(names.findall(re.sub(r"\[[\w:]+\]", "", text)))):
        if name not in recorded | strings and re.sub(r"_(bucket|sum|count)$", "", name) not in strings:
            faults.append(f"{where}: the code has no metric or label {name}")

# A uid is known to one Grafana only. The dashboard takes any data source that has the type of its variable.
wanted = {variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "datasource"}
with open("grafana/datasources.yml", encoding="utf-8") as file:
    provisioned = set(re.findall(r"^    type: (\S+)$", file.read(), re.M))
faults += [f"grafana/datasources.yml: has no data source of the type {kind}" for kind in wanted - provisioned]
for panel in panels:
    for part in panel, *panel.get("targets", []):
        uid = (part.get("datasource") or {}).get("uid", "${datasource}")
        if uid != "${datasource}":
            faults.append(f"dashboard.json: {panel['title']}: names the data source {uid}")

# A process that nobody scrapes raises no alert.
with open("../../docker-compose.yml", encoding="utf-8") as file:
    services = re.split(r"^  ([\w-]+):$", file.read(), flags=re.M)[1:]
listening = set()
for name, body in zip(services[::2], services[1::2]):
    listening.update(f"{name}:{port}" for port in re.findall(r"OPS_LISTEN: 0\.0\.0\.0:(\d+)", body))
with open("prometheus.yml", encoding="utf-8") as file:
    scraped = set(re.findall(r'"([\w-]+:\d+)"', file.read()))
faults += [f"prometheus.yml: does not scrape {target} of docker-compose.yml" for target in sorted(listening - scraped)]
faults += [f"prometheus.yml: docker-compose.yml has no {target}" for target in sorted(scraped - listening)]

print("\n".join(faults) if faults else f"dashboard.json: {len(expressions)} expressions are sound")
sys.exit(bool(faults))
PYTHON
