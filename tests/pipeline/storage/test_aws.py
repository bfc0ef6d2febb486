"""Where S3 is and who asks, from the environment and profile files alone."""

import pytest

from pipeline.storage import aws as aws_settings
from pipeline.storage.aws import NoCredentialsError, open_client, read_aws_settings
from pipeline.storage.s3 import ObjectStorage
from tests.support.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, point_at


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A function that writes the profile file; nothing else of AWS is set."""
    point_at(monkeypatch, "")
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}")

    def write(text):
        path = tmp_path / "config"
        path.write_text(text)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(path))

    return write


def test_the_endpoint_is_found_in_boto3s_order(profile, monkeypatch):
    assert read_aws_settings().config == {}
    profile("[default]\nregion = eu-west-1\nendpoint_url = http://a\n")
    assert read_aws_settings().config == {"region": "eu-west-1", "aws_endpoint_url_s3": "http://a"}
    profile(
        "[default]\nendpoint_url = http://a\nservices = mine\n"
        "[services mine]\ns3 =\n  endpoint_url = http://b\n"
    )
    assert read_aws_settings().config == {"aws_endpoint_url_s3": "http://b"}
    for name, url in (("AWS_ENDPOINT_URL", "http://c"), ("AWS_ENDPOINT_URL_S3", "http://d")):
        monkeypatch.setenv(name, url)
        assert read_aws_settings().config == {"aws_endpoint_url_s3": url}
    monkeypatch.setenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "true")
    assert read_aws_settings().config == {}


def test_plain_http_only_where_the_endpoint_says_so(profile, monkeypatch):
    assert not read_aws_settings().allow_http
    for url, plain in (("https://a", False), ("http://a", True)):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert read_aws_settings().allow_http is plain


@pytest.mark.parametrize(
    "url", ["http://key:secret@a", "a:1/secret", "ftp://secret", "http://a?secret"]
)
def test_an_endpoint_that_is_more_than_an_address_is_refused_unseen(profile, monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    with pytest.raises(ValueError, match="without a password or a query") as error:
        read_aws_settings()
    assert "secret" not in str(error.value)


def test_a_profile_gives_credentials_region_and_endpoint(profile, monkeypatch, s3_server, s3_url):
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION", "ENDPOINT_URL"):
        monkeypatch.delenv(f"AWS_{name}")
    profile(
        f"[profile lab]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n"
        f"region = us-east-1\nendpoint_url = {s3_server.endpoint}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert ObjectStorage(s3_url).create("x", b"1")
    assert ObjectStorage(s3_url).read("x") == b"1"


def test_a_profile_that_is_not_there_is_an_error(profile, monkeypatch):
    profile("[default]\nregion = eu-west-1\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(ValueError, match=r"AWS profile cannot be read: .*\(lab\)"):
        read_aws_settings()


def test_a_profile_needs_botocore(monkeypatch):
    monkeypatch.setattr(aws_settings, "Session", None)
    assert read_aws_settings().credentials is None
    monkeypatch.setenv("AWS_PROFILE", "lab")
    with pytest.raises(ValueError, match=r"botocore.*install ldznet\[s3\]"):
        read_aws_settings()


def test_no_credentials_are_said_so(profile, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(NoCredentialsError, match=r"x: could not read: no credentials were found"):
        ObjectStorage(f"s3://{BUCKET}/x").read("x")


def test_a_credential_process_that_fails_is_not_quoted(profile, monkeypatch):
    profile("[default]\ncredential_process = sh -c 'echo secret >&2; exit 1'\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(PermissionError, match="no credentials were found") as error:
        ObjectStorage(f"s3://{BUCKET}/x").read("x")
    assert "secret" not in str(error.value)
    with pytest.raises(OSError, match="unfinished uploads: ") as error:
        list(ObjectStorage(f"s3://{BUCKET}/x").list_uploads("layer/data"))
    assert "secret" not in str(error.value)


def test_botocores_client_takes_region_and_endpoint_as_obstore_does(profile, monkeypatch):
    assert open_client().meta.region_name == "us-east-1"
    profile("[default]\nregion = eu-west-1\nendpoint_url = http://a\n")
    assert open_client().meta.region_name == "eu-west-1"
    assert open_client().meta.endpoint_url == "http://a"
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    assert open_client().meta.region_name == "eu-north-1"
