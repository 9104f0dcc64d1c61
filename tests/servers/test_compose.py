import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_containers_are_the_moto_that_tests_use_and_listen_on_this_machine_alone():
    text = (ROOT / "localstack" / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    (version,) = re.findall(r"^moto==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {service["image"] for service in services.values()} == {f"motoserver/moto:{version}"}
    assert services["store"]["ports"] == ["127.0.0.1:9000:5000"]
    # Python that its container runs.
    compile(services["bucket"]["entrypoint"][2], "entrypoint", "exec")
