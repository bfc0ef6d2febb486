"""cluster.yaml by Ray's own rules and ours; its node types with Ray's autoscaler on this host."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.scenes.scene import write_corpus
from pipeline.spec.fields import FeaturesSpec, LatentsSpec, Spec
from tests.support.doc_blocks import list_blocks
from tests.support.ray_head import RayHead, read_small_cluster

ROOT = Path(__file__).parents[1]
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
AUTH_TOKEN = "~/.ray/auth_token"
# Access keys, private keys, long hexadecimal or base64 strings: nothing of that form belongs here.
SECRET = re.compile(r"AKIA|ASIA|PRIVATE KEY|secret_access|hf_[A-Za-z]{8}|[0-9a-f]{32}|[\w+/]{40,}=")
NUM_TARS = 4


def read_cluster():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def cluster():
    return read_cluster()


@pytest.fixture
def prepared(cluster):
    """The file as the launcher sees it, its defaults filled in."""
    return prepare_config(cluster)


def ray_start(commands):
    """The one command that starts Ray: (what is exported before it, its own words)."""
    (command,) = [command for command in commands if re.search(r"\bray start\b", command)]
    before, _, after = command.partition("ray start")
    return before, shlex.split(after)


def test_it_is_valid_by_rays_schema(prepared):
    validate_config(prepared)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout_minuts",), 5),
        (("available_node_types", "gpu_spot", "max_worker"), 5),
        (("available_node_types", "gpu_spot", "priority"), "first"),
        (("max_workers",), -1),
    ],
)
def test_a_wrong_key_or_value_is_not_valid(cluster, path, value):
    place = cluster
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError, match=str(value) if path[-1] in place else path[-1]):
        validate_config(prepare_config(cluster))


def test_the_head_runs_no_work_and_the_workers_are_alike(prepared):
    types = dict(prepared["available_node_types"])
    head = types.pop(prepared["head_node_type"])
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]
    spot = types["gpu_spot"]
    on_demand = types["gpu_on_demand"]
    assert types.keys() == {"gpu_spot", "gpu_on_demand"}
    # Ray's scheduler looks at the priority where the types fit a demand equally well.
    assert spot["resources"] == on_demand["resources"]
    assert spot["priority"] > on_demand["priority"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    without = {k: v for k, v in spot["node_config"].items() if k != "InstanceMarketOptions"}
    assert without == on_demand["node_config"]
    assert all(node_type["min_workers"] == 0 for node_type in types.values())


def test_nothing_is_left_when_it_goes_down(cluster):
    assert cluster["provider"]["cache_stopped_nodes"] is False
    for node_type in cluster["available_node_types"].values():
        for device in node_type["node_config"]["BlockDeviceMappings"]:
            assert device["Ebs"]["DeleteOnTermination"] is True


def test_every_path_mounted_exists(cluster):
    for local in cluster["file_mounts"].values():
        assert local == AUTH_TOKEN or (ROOT / local).exists(), local
    remote = cluster["file_mounts"].keys()
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = [pattern.removesuffix("*") for pattern in found["find"]["include"]]
    assert {f"/home/ubuntu/ldznet/{name}" for name in packages} <= remote


def test_what_is_installed_is_pinned_and_exists(cluster, prepared):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = (ROOT / "constraints.txt").read_text()
    commands = prepared["head_setup_commands"] + prepared["worker_setup_commands"]
    installs = [command for command in commands if "pip install" in command]
    assert installs
    for command in installs:  # the launcher's own default would install any boto3
        words = shlex.split(command)
        constraints = words[words.index("-c") + 1]
        assert f"/home/ubuntu/ldznet/{constraints}" in cluster["file_mounts"]
        for extra in re.findall(r"'?\.\[([\w,]+)\]", command):
            assert set(extra.split(",")) <= project["optional-dependencies"].keys()
    assert re.search(r"^torch==[\d.]+$", pinned, re.MULTILINE), "+cpu would end on a GPU's node"
    assert re.search(r"^ray==[\d.]+$", pinned, re.MULTILINE)
    assert any("torch.cuda.is_available()" in command for command in commands)


def test_rays_processes_have_the_token(cluster):
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == AUTH_TOKEN
    for key in START_COMMANDS:
        before, _ = ray_start(cluster[key])
        assert re.search(r"\bexport\b[^;]*\bRAY_AUTH_MODE=token\b", before), key


def test_the_dashboard_is_on_loopback(cluster):
    _, options = ray_start(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in options
    _, options = ray_start(cluster["worker_start_ray_commands"])
    assert not any("dashboard-host" in option for option in options)


def test_there_is_no_secret_and_no_key():
    assert SECRET.search((ROOT / "cluster.yaml").read_text()) is None
    config = read_cluster()
    assert "aws_credentials" not in config["provider"]
    for name, node_type in config["available_node_types"].items():
        profile = node_type["node_config"]["IamInstanceProfile"]["Name"]
        assert profile == ("ldznet-head" if name == "head" else "ldznet-worker")


# Writes the words of each call to a file, NUL between them; answers the call whose answer is used.
AWS = r"""
aws() { if [ "$1" = sts ]; then echo 123456789012; else printf '%s\0' "$@" end >> "$CALLS"; fi; }
"""


@pytest.fixture
def policies(tmp_path):
    """(role or bucket, name) -> what docs/cluster.md gives it, as the shell makes it."""
    blocks = [block.text for block in list_blocks(ROOT / "docs" / "cluster.md")]
    script = "\n".join(block for block in blocks if "aws iam" in block or "aws s3api" in block)
    calls = tmp_path / "calls"
    environment = {**os.environ, "CALLS": str(calls)}
    subprocess.run(["bash", "-euc", AWS + script], env=environment, check=True, timeout=60)
    found = {}
    for call in calls.read_text().removesuffix("\0").split("\0end\0"):
        words = call.removesuffix("\0end").split("\0")
        options = dict(zip(words[2::2], words[3::2], strict=True))
        if words[1] == "put-role-policy":
            name = options["--role-name"], options["--policy-name"]
            found[name] = json.loads(options["--policy-document"])
        elif words[1] == "put-bucket-lifecycle-configuration":
            found["lifecycle"] = json.loads(options["--lifecycle-configuration"])
        else:
            assert words[1] != "attach-role-policy", (
                "a policy of Amazon's is wider than what is used"
            )
    return found


def list_statements(policy, action):
    return [x for x in policy["Statement"] if action in list_actions(x)]


def list_actions(statement):
    actions = statement["Action"]
    return [actions] if isinstance(actions, str) else actions


def test_the_heads_role_is_what_rays_launcher_calls(policies, cluster):
    """Of AWSNodeProvider's calls those that a head makes which neither stops nor reuses nodes."""
    policy = policies["ldznet-head", "workers"]
    actions = {action for x in policy["Statement"] for action in list_actions(x)}
    used = {f"ec2:{name}Instances" for name in ("Describe", "Run", "Terminate")}
    assert actions == used | {"ec2:CreateTags", "iam:PassRole", "ssm:GetParameters"}
    place = importlib.util.find_spec("ray.autoscaler._private.aws").submodule_search_locations[0]
    source = (Path(place) / "node_provider.py").read_text()
    called = set(re.findall(r"\bec2(?:_fail_fast)?(?:\.meta\.client)?\.([a-z]\w+)", source)) - {
        "meta"
    }
    allowed = {"instances", "create_instances", "create_tags", "terminate_instances"}
    of_other_settings = {"start_instances", "stop_instances", "describe_images"}
    assert called == allowed | of_other_settings | {"describe_instance_types"}  # by ``ray up``


def test_the_heads_role_is_bound_to_this_clusters_workers(policies, cluster):
    policy = policies["ldznet-head", "workers"]
    workers = [t for name, t in cluster["available_node_types"].items() if name != "head"]
    run, others = list_statements(policy, "ec2:RunInstances")
    equal = run["Condition"]["StringEquals"]
    assert {equal["ec2:InstanceType"]} == {t["node_config"]["InstanceType"] for t in workers}
    assert equal["aws:RequestTag/ray-cluster-name"] == cluster["cluster_name"]
    region, account = cluster["provider"]["region"], "123456789012"
    assert run["Resource"] == f"arn:aws:ec2:{region}:{account}:instance/*"
    (profile,) = {t["node_config"]["IamInstanceProfile"]["Name"] for t in workers}
    assert run["Condition"]["ArnEquals"]["ec2:InstanceProfile"].endswith(f"/{profile}")
    assert not [resource for resource in others["Resource"] if "instance/" in resource]
    for action in ("ec2:TerminateInstances", "ec2:CreateTags"):
        for statement in list_statements(policy, action):
            tags = statement["Condition"]["StringEquals"]
            assert cluster["cluster_name"] in tags.values()
            assert "worker" in tags.values()  # the head cannot end itself
    (passed,) = list_statements(policy, "iam:PassRole")
    assert passed["Resource"] == f"arn:aws:iam::{account}:role/{profile}"


def test_the_bucket_ends_unfinished_uploads_and_roles_may_list_them(policies):
    (rule,) = policies["lifecycle"]["Rules"]
    assert (rule["Status"], rule["Filter"]) == ("Enabled", {})
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    for role in ("ldznet-head", "ldznet-worker"):
        (statement,) = policies[role, "bucket"]["Statement"]
        uploads = {action for action in statement["Action"] if "Multipart" in action}
        assert uploads == {
            "s3:AbortMultipartUpload",
            "s3:ListBucketMultipartUploads",
            "s3:ListMultipartUploadParts",
        }


@pytest.fixture
def small_cluster():
    """A head with the file's node types, scaled down, and no worker."""
    head = RayHead(autoscaling=read_small_cluster())
    try:
        yield head
    finally:
        head.close()


@pytest.mark.slow
def test_a_run_starts_a_worker_which_goes_back_when_idle(small_cluster, ldm_folder, tmp_path):
    """From no worker at all, by the priority a spot one; the job's GPU is never touched."""
    write_corpus(tmp_path, split="train", num_images=2 * NUM_TARS, images_per_tar=2, size_px=64)
    spec = Spec(
        latents=LatentsSpec(model=str(ldm_folder), size=64),
        features=FeaturesSpec(blocks=(6,), timesteps=(300,)),
    )
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    store = tmp_path / "store"
    command = [
        sys.executable, "-m", "jobs", "encode", "--corpus", str(tmp_path / "*.tar"), "--store",
        str(store), "--spec", str(tmp_path / "spec.yaml"), "--actors", "1:1", "--gpus", "1",
        "--threads", "2", "--batch", "4", "--metrics", str(tmp_path / "metrics.jsonl"),
    ]  # fmt: skip
    result = subprocess.run(
        command, env={**small_cluster.environment, "RAY_ADDRESS": small_cluster.address},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(list(store.glob("features-*/commits/*.json"))) == NUM_TARS
    wait_for(small_cluster, r"RAY_RUNNING->RAY_STOP_REQUESTED .*type=gpu_spot")
    wait_for(small_cluster, r"TERMINATING->TERMINATED .*type=gpu_spot")
    assert "type=gpu_on_demand" not in read_monitor(small_cluster)


def read_monitor(head):
    return head.read_log("monitor.log") + os.linesep + head.read_log("monitor.out")


def wait_for(head, pattern, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not re.search(pattern, read_monitor(head)):
        assert time.monotonic() < deadline, f"{pattern} not in {read_monitor(head)[-4000:]}"
        time.sleep(0.5)
