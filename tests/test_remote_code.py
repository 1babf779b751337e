"""Checkpoints that bring their code: they compute the same where the package is not installed."""

import json
import shutil

import pytest
import torch
import transformers
from hub_server import running_hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from launching import run_python
from tiny_models import POSITIONS, STACKS, WINDOWS, make_model, random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_reformer
from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.commands import export as export_command
from hf_reformer.modeling.remote_code import AUTO_CLASSES, code
from scripts.maintain import kernel_folder


# Runs where importing the package fails, as if it were not there.
WITHOUT_PACKAGE = """
import json, sys
sys.modules.update(dict.fromkeys(["hf_reformer", *{hidden}]))
import torch, transformers
torch.set_num_threads(1)
given = torch.load({inputs!r})
{body}
"""
COMPUTE = """
for auto_class, (folder, expected) in given["models"].items():
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    output = model(**expected["inputs"])[0]
    assert torch.equal(output, expected["output"]), auto_class
    model.train()
    torch.manual_seed(1)
    model(**expected["inputs"])[0].square().sum().backward()
    for name, gradient in expected["gradients"].items():
        assert torch.equal(dict(model.named_parameters())[name].grad, gradient), (auto_class, name)
    if "generated" in expected:
        generated = model.eval().generate(given["ids"], max_new_tokens=5, do_sample=False)
        assert torch.equal(generated, expected["generated"])
"""
SAVE_AGAIN = """
folder, expected = given["models"]["AutoModelForCausalLM"]
pipe = transformers.pipeline("text-generation", model=folder, trust_remote_code=True)
assert type(pipe.tokenizer).__name__ == "ReformerByteTokenizer"
assert pipe.tokenizer("ab").input_ids == [99, 100]
pipe("ab", max_new_tokens=2)
pipe.save_pretrained({again!r})
again = transformers.AutoModelForCausalLM.from_pretrained({again!r}, trust_remote_code=True).eval()
assert torch.equal(again(given["ids"])[0], expected["output"])
transformers.AutoModelForSequenceClassification.from_pretrained({again!r}, trust_remote_code=True)
transformers.AutoTokenizer.from_pretrained({again!r}, trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
attempts = [lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)]
for given_config in (config, again.config, pipe.model.config):
    attempts += [
        lambda: transformers.AutoModelForMaskedLM.from_pretrained(folder, config=given_config),
        lambda: transformers.AutoModelForMaskedLM.from_config(given_config),
        lambda: transformers.AutoModelForCausalLM.from_config(given_config),
    ]
for attempt in attempts:
    try:
        model = attempt()
    except (NotImplementedError, ValueError) as error:
        assert "hf_reformer.lsh" in str(error) or "trust_remote_code=True" in str(error), error
    else:
        assert type(model).__module__.startswith("transformers_modules."), type(model)
folder = given["models"]["AutoModelForMaskedLM"][0]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert len(tokenizer("a" * 600, truncation=True).input_ids) == tokenizer.model_max_length == 128
"""
PUSH = """
import hf_reformer
model = hf_reformer.ReformerForCausalLM.from_pretrained({folder!r})
tokenizer = hf_reformer.ReformerByteTokenizer()
model.push_to_hub("me/mine")
model.push_to_hub("me/mine", remote_code=True)
tokenizer.push_to_hub("me/mine", remote_code=True)
card = {{"license": "mit", "language": "en", "datasets": ["me/text"]}}
model.push_to_hub("me/weights", remote_code=True, code_repository="me/mine", metadata=card)
"""
# What came by another repository's code is saved with its own, under no other's name.
PULL = """
for name in ("me/mine", "me/weights"):
    model = transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    assert torch.equal(model(given["ids"])[0], given["models"]["AutoModelForCausalLM"][1]["output"])
tokenizer = transformers.AutoTokenizer.from_pretrained("me/mine", trust_remote_code=True)
assert tokenizer("ab").input_ids == [99, 100]
model.save_pretrained({saved!r})
names = json.load(open({saved!r} + "/config.json"))["auto_map"].values()
assert not any("--" in name for name in names), names
"""


LOAD_KERNEL = """
import importlib.util, json, sys
sys.modules.update(hf_reformer=None, transformers=None)
folder = sys.argv[1]
name = json.load(open(folder + "/metadata.json"))["id"]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
kernel = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel)
import torch
query, key, value = torch.randn(3, 1, 50, 2, 8)
output, _ = kernel.local_attention(
    query, key, value, chunk_length=50, num_chunks_before=0, causal=True, circular_look_around=False
)
query, key, value = (vectors.transpose(1, 2) for vectors in (query, key, value))
expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
torch.testing.assert_close(output, expected.transpose(1, 2))
"""


def without_package(tmp_path, inputs, body, hidden=(), **environment):
    script = tmp_path / "without_package.py"
    script.write_text(WITHOUT_PACKAGE.format(hidden=list(hidden), inputs=str(inputs), body=body))
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"} | environment
    done = run_python(script, cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of exports, one for each Auto class, and the file with what each computes."""
    folder, ids = tmp_path_factory.mktemp("exported"), random_ids(2, 40)
    given = {"ids": ids, "models": {}}
    for auto_class, name in AUTO_CLASSES.items():
        causal = (
            WINDOWS | POSITIONS["LSH rotary"] | {"lsh_value_shift": 1, "is_decoder": True, "vocab_size": 258}
            if name == "ReformerForCausalLM"
            else {}
        )
        if name == "ReformerForConditionalGeneration":
            causal = WINDOWS | {"is_encoder_decoder": True}
        model_class, path = getattr(hf_reformer, name), folder / auto_class
        made = make_model(model_class, attn_layers=STACKS["mixed"], hash_seed=3, **causal)
        hf_reformer.export(made, ReformerByteTokenizer(), path)
        # Where weights begin in memory decides how a product with one column is rounded.
        model = model_class.from_pretrained(path).eval()
        # One of several choices for each row.
        inputs = {"input_ids": ids[:, None] if name == "ReformerForMultipleChoice" else ids}
        if name == "ReformerForConditionalGeneration":
            inputs["decoder_input_ids"] = ids
        expected = {"inputs": inputs, "output": model(**inputs)[0].detach()}
        model.train()
        torch.manual_seed(1)
        model(**inputs)[0].square().sum().backward()
        expected["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        if name in ("ReformerForCausalLM", "ReformerForConditionalGeneration"):
            expected["generated"] = model.eval().generate(ids, max_new_tokens=5, do_sample=False)
        given["models"][auto_class] = str(path), expected
    torch.save(given, folder / "given.pt")
    return folder


def test_all_files_lie_side_by_side():
    files = code()
    assert {"configuration_reformer.py", "modeling_reformer.py", "tokenization_reformer_byte.py"} <= files.keys()
    for name, text in files.items():
        assert "from .." not in text, name
        compile(text, name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [[], ["triton"]], ids=["all", "no triton"])
def test_models_compute_the_same_without_the_package(exported, tmp_path, hidden):
    without_package(tmp_path, exported / "given.pt", COMPUTE, hidden)


@pytest.mark.slow
def test_what_is_saved_again_brings_its_code(exported, tmp_path):
    body = SAVE_AGAIN.format(again=str(tmp_path / "again"))
    done = without_package(tmp_path, exported / "given.pt", body)
    assert "not supported" not in done.stderr
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", *AUTO_CLASSES}
    assert (tmp_path / "again" / "modeling_reformer.py").is_file()


def test_where_the_package_is_imported_everything_is_its_own(exported, tmp_path):
    """Also with trust; and what is saved then is a checkpoint like any other."""
    folder = exported / "AutoModelForCausalLM"
    for trust in (None, True):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        assert type(model) is ReformerForCausalLM
        assert type(tokenizer) is ReformerByteTokenizer
    for saved, file in ((model, "config.json"), (tokenizer, "tokenizer_config.json")):
        saved.save_pretrained(tmp_path)
        assert "auto_map" not in json.loads((tmp_path / file).read_text())
    plain = make_model(ReformerForCausalLM, attn_layers=["local", "lsh"], is_decoder=True)
    hf_reformer.export(plain, None, tmp_path / "plain")
    with pytest.raises(NotImplementedError, match=r"hf_reformer\.local"):
        transformers.models.reformer.ReformerModelWithLMHead.from_pretrained(tmp_path / "plain")
    ReformerForCausalLM.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "saved")
    transformers.models.reformer.ReformerModelWithLMHead.from_pretrained(tmp_path / "saved")


@pytest.mark.slow
def test_pushed_and_loaded_by_name(exported, tmp_path):
    script, folder = tmp_path / "push.py", exported / "AutoModelForCausalLM"
    script.write_text(PUSH.format(folder=str(folder)))
    with running_hub() as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x", "HF_HUB_DISABLE_XET": "1"}
        online |= {"HF_HOME": str(tmp_path / "home")}
        done = run_python(script, **online)
        assert done.returncode == 0, done.stderr
        assert not any(name.endswith(".py") for name in hub.files["me/weights"])
        without_package(tmp_path, exported / "given.pt", PULL.format(saved=str(tmp_path / "saved")), **online)
        assert sum(name.endswith(".py") for _, name in hub.requests) > len(hub.files["me/mine"])
        both = ModelCard(hub.files["me/mine"]["README.md"].decode()).text
        card = ModelCard(hub.files["me/weights"]["README.md"].decode())
    assert 'code_revision="main",  # the same, of me/mine' in card.text
    assert both.count("## How to load it") == 1 and "trust_remote_code=True" in both
    assert card.data.pipeline_tag == "text-generation"
    assert "custom_code" in card.data.tags
    assert (card.data.license, card.data.language, card.data.datasets) == ("mit", "en", ["me/text"])
    # Not the template that transformers pushes.
    for text in (both, card.text):
        assert "## Limits" in text and "[More Information Needed]" not in text


@pytest.mark.slow
def test_operators_alone_need_torch_only(tmp_path):
    """The folder for the `kernels` library, imported as that does."""
    kernel_folder.write_kernel(tmp_path / "kernel")
    done = run_python("-c", LOAD_KERNEL, str(tmp_path / "kernel" / "build" / "torch-cuda"))
    assert done.returncode == 0, done.stderr
    sources = {path.name for path in (tmp_path / "kernel" / "torch-ext" / "hf_reformer").iterdir()}
    assert {"__init__.py", "lsh_operator.py", "triton_kernels.py"} <= sources
    assert not any(name.startswith("modeling") for name in sources)


def test_the_command_keeps_the_report(exported, tmp_path):
    source, target = tmp_path / "trained", tmp_path / "exported"
    shutil.copytree(exported / "AutoModelForMaskedLM", source)
    shown = '![A picture](some.png)\n\npipeline("fill-mask", model="trained")\n'
    (source / "README.md").write_text(f"---\nlicense: mit\ntags:\n- mine\n---\n# Figures\n1.23\n{shown}")
    (source / "some.png").write_bytes(b"png")
    export_command.main(["--model", str(source), "--output_dir", str(target), "--language", "en", "de"])
    card = ModelCard.load(target / "README.md")
    assert card.data.language == ["en", "de"]
    assert "1.23" in card.text and "trust_remote_code=True" in card.text
    assert (target / "some.png").read_bytes() == b"png" and 'model="exported")' in card.text
    assert card.data.license == "mit" and card.data.pipeline_tag == "fill-mask"
    assert {"mine", "custom_code"} <= set(card.data.tags)
    with pytest.raises(SystemExit, match="holds something already"):
        export_command.main(["--model", str(source), "--output_dir", str(target)])


def test_what_is_no_model_of_the_package_is_refused(tmp_path):
    class Mine(ReformerForMaskedLM):
        pass

    for attempt in (
        lambda: hf_reformer.export(make_model(Mine), None, tmp_path),
        lambda: make_model(Mine).push_to_hub("me/mine", remote_code=True),
    ):
        with pytest.raises(ValueError, match=r"Mine is of test_remote_code, and what is exported is"):
            attempt()
    with pytest.raises(HFValidationError):
        hf_reformer.export(make_model(ReformerForMaskedLM), None, tmp_path, code_repository="not a repository")
    assert not any(tmp_path.iterdir())


def test_another_export_into_the_folder_says_what_is_there_now(tmp_path):
    models = [make_model(model_class) for model_class in (ReformerForCausalLM, ReformerForMaskedLM)]
    for model in models:
        hf_reformer.export(model, None, tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "fill-mask"
    assert "ReformerForCausalLM" not in card.text


def test_releases_are_checked_on_import_as_by_the_package():
    assert code()["modeling_reformer.py"].count("check_installed_releases()") == 1
