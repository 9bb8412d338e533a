"""The services that other tests stand on do what their fixtures promise."""

import json
import subprocess
import sys

import docker
import httpx
import pycurl
import pytest

from tests.support import services


@pytest.mark.docker
def test_busybox_image_runs_a_shell_with_applets(engine: docker.APIClient, busybox: str) -> None:
    script = "echo 3 4 | awk '{print $1 + $2}'; id -un; ls -ld /tmp"
    container = engine.create_container(busybox, ["/bin/sh", "-c", script])["Id"]
    try:
        engine.start(container)
        assert engine.wait(container)["StatusCode"] == 0
        first, user, tmp = engine.logs(container).decode().splitlines()
    finally:
        engine.remove_container(container, force=True)
    assert (first, user) == ("7", "root")
    assert tmp.startswith("drwxrwxrwt")


@pytest.mark.registry
@pytest.mark.docker
def test_registry_keeps_its_images_and_port_over_a_restart(engine: docker.APIClient, busybox: str) -> None:
    with services.running_registry() as registry:
        reference = f"{registry.address}/tests/busybox"
        engine.tag(busybox, reference, "1")
        try:
            assert "error" not in engine.push(reference, "1")
            registry.stop()
            assert not services.answers(f"http://{registry.address}/v2/")
            registry.start()
            tags = httpx.get(f"http://{registry.address}/v2/tests/busybox/tags/list", trust_env=False).json()
        finally:
            engine.remove_image(f"{reference}:1")
    assert tags["tags"] == ["1"]


@pytest.mark.registry
def test_registry_with_a_password_refuses_others() -> None:
    with services.running_registry(("lab", "a-password")) as registry:
        url = f"http://{registry.address}/v2/"
        assert httpx.get(url, trust_env=False).status_code == 401
        assert httpx.get(url, auth=("lab", "another"), trust_env=False).status_code == 401
        assert httpx.get(url, auth=("lab", "a-password"), trust_env=False).status_code == 200


@pytest.mark.s3
def test_seaweedfs_checks_signatures(seaweedfs: services.S3) -> None:
    url = f"{seaweedfs.url}/tests-services"
    assert httpx.put(url, trust_env=False).status_code == 403
    assert _signed_put(url, seaweedfs, "not-the-secret") == 403
    assert _signed_put(url, seaweedfs, seaweedfs.secret_key) == 200


def _signed_put(url: str, store: services.S3, secret_key: str) -> int:
    curl = pycurl.Curl()
    curl.setopt(pycurl.URL, url)
    curl.setopt(pycurl.CUSTOMREQUEST, "PUT")
    curl.setopt(pycurl.AWS_SIGV4, f"aws:amz:{store.region}:s3")
    curl.setopt(pycurl.USERPWD, f"{store.access_key}:{secret_key}")
    curl.setopt(pycurl.WRITEFUNCTION, lambda _: None)
    curl.perform()
    status = curl.getinfo(pycurl.RESPONSE_CODE)
    curl.close()
    return int(status)


@pytest.mark.moto
def test_moto_signs_a_user_in_with_a_password(moto: services.Moto) -> None:
    user = moto.create_user()
    reply = moto.cognito(
        "InitiateAuth",
        AuthFlow="USER_PASSWORD_AUTH",
        ClientId=user.client_id,
        AuthParameters={"USERNAME": user.username, "PASSWORD": user.password},
    )
    result = reply["AuthenticationResult"]
    assert isinstance(result, dict)
    assert {"IdToken", "RefreshToken", "ExpiresIn"} <= result.keys()


_READ_GPUS = """
import json, pynvml as n
n.nvmlInit()
def read(i):
    h = n.nvmlDeviceGetHandleByIndex(i)
    uuid = n.nvmlDeviceGetUUID(h)
    assert n.nvmlDeviceGetName(n.nvmlDeviceGetHandleByUUID(uuid)) == n.nvmlDeviceGetName(h)
    v2 = n.nvmlDeviceGetMemoryInfo(h, n.nvmlMemory_v2)
    return [uuid, n.nvmlDeviceGetName(h), n.nvmlDeviceGetMemoryInfo(h).total // 2**20, v2.total // 2**20,
            n.nvmlDeviceGetCudaComputeCapability(h)]
print(json.dumps([read(i) for i in range(n.nvmlDeviceGetCount())]))
n.nvmlShutdown()
"""


def test_pynvml_reads_the_stub_gpus(gpus: services.GpuStub) -> None:
    env = gpus.env("NVIDIA RTX A4000:16376:8.6", "NVIDIA H100 80GB HBM3:81559:9.0")
    read = subprocess.run([sys.executable, "-c", _READ_GPUS], env=env, check=True, capture_output=True, text=True)
    assert json.loads(read.stdout) == [
        [gpus.uuid(0), "NVIDIA RTX A4000", 16376, 16376, [8, 6]],
        [gpus.uuid(1), "NVIDIA H100 80GB HBM3", 81559, 81559, [9, 0]],
    ]


def test_a_missing_service_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no-such-program"):
        services.require_program("no-such-program", "no-package")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        services.require_program("no-such-program", "no-package")
