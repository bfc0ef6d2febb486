"""Spec files: what is refused and how it is said, and what a layer's spec holds on to."""

import json

import pytest

from pipeline.base.yaml import SpecError, load_yaml, parse_yaml
from pipeline.spec.fields import INDEX_COLUMNS, FeaturesSpec, LatentsSpec, Spec, UniformTimesteps
from pipeline.spec.layer import LayerSpec, fingerprint
from pipeline.store.layout import INDEX_SCHEMA

SECTION = LatentsSpec(model="m").model_dump(mode="json", exclude={"model", "revision", "variant"})
CANONICAL = {"schema_version": 1, "kind": "latents", "section": SECTION, "scaling_factor": 0.5}
LAYER = {
    "kind": "latents",
    "fingerprint": fingerprint(CANONICAL),
    "canonical": CANONICAL,
    "source": {"model": "m", "revision": None, "variant": None},
    "tolerance": 0.002,
}


def parse(text):
    return parse_yaml(text, Spec, where="spec.yaml")


def test_a_spec_file_is_read(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(
        "latents: {model: some/model, size: 512, crop: phrase, views: 3, flip: true}\n"
        "features:\n  blocks: [6, 8]\n  timesteps: {low: 300, high: 500, draws: 3}\n"
    )
    spec = load_yaml(path, Spec)
    assert (spec.latents.size, spec.latents.views, spec.latents.flip) == (512, 3, True)
    assert spec.features.timesteps == UniformTimesteps(low=300, high=500, draws=3)
    assert (spec.features.num_draws, spec.features.blocks) == (3, (6, 8))


def test_defaults_are_the_papers():
    spec = parse("latents: {model: m}\nfeatures: {}")
    assert spec.latents.size == 384
    assert spec.features.blocks == (6, 7, 8, 9, 10)
    assert spec.features.timesteps == (300, 400, 500)
    assert parse("latents: {model: m}").features is None


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        ("{model: m, sise: 384}", r"latents\.sise: no such field; there are model, .*seed$"),
        ("{}", r"latents\.model: Field required"),
        ("{model: m, size: large}", r"latents\.size: .*integer.*\(got 'large'\)"),
        ("{model: m, size: 100}", r"latents\.size: Input should be a multiple of 64 \(got 100\)"),
        ("{model: m, size: 0}", r"latents\.size: .*greater than or equal to 64"),
        ("{model: m, size: 64000}", r"latents\.size: .*less than or equal to 4096"),
        ("{model: m, crop: centre}", r"latents\.crop: .*'center', 'resize' or 'phrase'"),
        ("{model: m, views: 2}", r"views must be 1 with crop: center"),
        ("{model: m, prompts: a photo}", r"latents\.prompts: .*valid tuple"),
        ("{model: m, prompts: []}", r"must hold \{\} once"),
        ("{model: m, prompts: ['no place']}", r"must hold \{\} once.*no place"),
        ("{model: m, prompts: ['{} and {}']}", r"must hold \{\} once"),
        (
            '{model: m, prompts: ["\\ud800 {}"]}',
            r"no control character or lone surrogate, got \['\\ud800 \{\}'\]",
        ),
        ("{model: [m]}", r"latents\.model: .*valid string"),
        ("7", r"latents: .*(dictionary|LatentsSpec)"),
        ("{model: m, keep_image: perhaps}", r"latents\.keep_image: .*boolean"),
    ],
)
def test_a_latents_section_that_cannot_be_is_refused(latents, message):
    with pytest.raises(SpecError, match=rf"(?s)^spec\.yaml: is not a valid Spec:.*{message}"):
        parse(f"latents: {latents}")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ("{blocks: []}", r"blocks must be distinct numbers from 1, ascending, got \[\]"),
        ("{blocks: [0]}", r"blocks must be distinct"),
        ("{blocks: [7, 6]}", r"got \[7, 6\]"),
        ("{blocks: [6, 6]}", r"got \[6, 6\]"),
        ("{timesteps: []}", r"timesteps must be in \[0, 1000\)"),
        ("{timesteps: [999, 1000]}", r"got \[1000\]"),
        ("{timesteps: [-1]}", r"got \[-1\]"),
        ("{timesteps: {low: 500, high: 500, draws: 1}}", r"low must be below high"),
        ("{timesteps: {low: 0, high: 10, draws: 0}}", r"draws: .*greater than or equal to 1"),
        ("{timesteps: {low: 0, high: 10, draws: 1, seed: 3}}", r"seed: no such field"),
        ("{condition: none}", r"features\.condition"),
        ("{storage: float32}", r"features\.storage"),
        ("{batch: 3}", r"features\.batch: no such field; there are blocks, timesteps"),
    ],
)
def test_a_features_section_that_cannot_be_is_refused(features, message):
    with pytest.raises(SpecError, match=rf"(?s){message}"):
        parse(f"latents: {{model: m}}\nfeatures: {features}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping of fields, got NoneType"),
        ("- a\n- b", "expected a mapping of fields, got list"),
        ("latents: {model: m", "is not plain YAML"),
        ("latents:\n\tmodel: m", "is not plain YAML"),
        ("a: 1\n---\nb: 2", "is not plain YAML"),
        ("latents: {model: m, seed: " + "9" * 5000 + "}", "is not plain YAML"),
        ("latents: " + "[" * 1200, "is not plain YAML"),
        ("latents: {model: m, size: 64, size: 384}", "the key 'size' is given twice"),
        ("latents: {model: m}\nlatents: {model: n}", "the key 'latents' is given twice"),
        ("latents: !!python/object/apply:os.system [id]", "line 1: aliases .* and tags"),
        ("latents:\n  model: !!binary aGk=", "line 2: aliases .* and tags"),
        ("latents: {model: m}\nfeatures: {blocks: !!set {6, 7}}", "tags .* are not read"),
        ("latents: &l {model: m}\nfeatures: *l", "line 2: aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("base: &b {model: m}\nlatents: {<<: *b}", "aliases"),
    ],
)
def test_text_that_is_not_plain_yaml_is_refused(text, message):
    with pytest.raises(SpecError, match=rf"^spec\.yaml: .*{message}"):
        parse(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.yaml: cannot be read"):
        load_yaml(tmp_path / "none.yaml", Spec)
    (tmp_path / "latin.yaml").write_bytes(b"latents: {model: \xe9}")
    with pytest.raises(SpecError, match=r"latin\.yaml: cannot be read"):
        load_yaml(tmp_path / "latin.yaml", Spec)


def test_errors_shorten_what_was_got():
    with pytest.raises(SpecError) as raised:
        parse("latents: {model: m, size: " + "x" * 10_000 + "}")
    assert len(str(raised.value)) < 400


def test_specs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        LatentsSpec(model="m").size = 128


def test_a_fingerprint_depends_on_content_not_on_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1, "b": [1, 2]}) != fingerprint({"a": 1, "b": [2, 1]})


def test_a_layer_spec_survives_json():
    layer = LayerSpec.model_validate(LAYER)
    assert LayerSpec.model_validate_json(layer.model_dump_json()) == layer
    assert layer.latents == LatentsSpec(model="m")
    assert layer.folder == f"latents-{layer.fingerprint}"
    assert layer.scaling_factor == 0.5
    with pytest.raises(SpecError, match="expected a features layer"):
        _ = layer.features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["canonical"]["section"].update(size=128), "fingerprint must be .* edited"),
        (lambda x: x.update(fingerprint="0" * 16), "fingerprint must be"),
        (lambda x: x.update(fingerprint="../../../../etc"), "String should match pattern"),
        (lambda x: x.update(kind="else"), "'latents' or 'features'"),
        (lambda x: x.update(more=1), "Extra inputs"),
        (lambda x: x["source"].update(size=128), "source or section is not a layer's"),
        (lambda x: x["source"].pop("revision"), "source or section is not a layer's"),
    ],
)
def test_an_edited_layer_spec_is_refused(change, message):
    plain = json.loads(json.dumps(LAYER))
    change(plain)
    with pytest.raises(ValueError, match=message):
        LayerSpec.model_validate(plain)


@pytest.mark.parametrize("section", [None, {"sise": 3}, {"size": 63}])
def test_a_layer_spec_with_a_section_of_another_kind_is_refused(section):
    canonical = CANONICAL | {"section": section} if section else {"kind": "latents"}
    plain = LAYER | {"canonical": canonical, "fingerprint": fingerprint(canonical)}
    with pytest.raises(ValueError, match=r"section|sise|size"):
        LayerSpec.model_validate(plain)


def test_a_features_layer_names_its_latents():
    section = FeaturesSpec().model_dump(mode="json")
    canonical = {"kind": "features", "section": section, "latents": "0123456789abcdef"}
    layer = LayerSpec.model_validate(
        LAYER | {"kind": "features", "canonical": canonical, "fingerprint": fingerprint(canonical)}
    )
    assert layer.latents_folder == "latents-0123456789abcdef"
    assert layer.features == FeaturesSpec()
    with pytest.raises(SpecError, match="expected a latents layer"):
        _ = layer.latents


def test_how_tars_are_split_is_not_what_a_layer_is():
    layer = LayerSpec.model_validate(LAYER)
    assert layer.split_bytes is None
    split = LayerSpec.model_validate(LAYER | {"split_bytes": 2**30})
    assert (split.split_bytes, split.folder) == (2**30, layer.folder)
    assert LayerSpec.model_validate_json(split.model_dump_json()) == split
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        LayerSpec.model_validate(LAYER | {"split_bytes": 0})


def test_columns_of_the_index_are_taken_and_keep_json_adds_others():
    assert tuple(INDEX_SCHEMA.names) == INDEX_COLUMNS
    with pytest.raises(ValueError, match=r"columns that every index has, got \['key', 'phrase'\]"):
        LatentsSpec(model="m", keep_json=("uid", "key", "phrase"))
    with pytest.raises(ValueError, match="distinct printable names"):
        LatentsSpec(model="m", keep_json=("uid", "uid"))
