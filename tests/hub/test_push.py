"""Publishing, over real HTTP: what arrives, what is sent again, what is left alone."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from hf_selortho import SelOrthoSAE
from hf_selortho.hub.publication import SOURCE
from tests.finished_run import save_run
from tests.hub_client import HubClient
from tests.loopback_hub import LoopbackHub

OF_AN_SAE = {
    "config.json", "model.safetensors", "metrics.json", "run.json", "pictures/a.png", "pictures/b.png",
    "saelens/cfg.json", "saelens/sae_weights.safetensors",
}  # fmt: skip


def push(client: HubClient, run: Path, repo: str, *arguments: str) -> str:
    """What the script prints."""
    done = client.script("push_to_hub", str(run), "--repo_id", repo, *arguments)
    assert done.code == 0, done.err
    return done.out


def refused(client: HubClient, run: Path, repo: str, *arguments: str) -> str:
    """The one line in which the script refuses."""
    done = client.script("push_to_hub", str(run), "--repo_id", repo, *arguments)
    lines = [line for line in done.err.splitlines() if not line.startswith(("the Hub does not answer", "14 files"))]
    assert done.code == 2 and done.out == "", (done.out, done.err)
    assert lines[-1].startswith("push_to_hub.py: error: "), done.err
    assert "Traceback" not in done.err
    return lines[-1].removeprefix("push_to_hub.py: error: ")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def own_commits(hub: LoopbackHub, repo: str, revision: str = "main") -> list[str]:
    return [commit.title for commit in hub.commits(repo, revision)[:-1]]  # the last one is the Hub's own


def test_a_run_is_one_commit_the_same_again_is_none_and_only_what_differs_is_sent(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    before = snapshot(run)
    said = push(client, run, "acme/once", "--license", "apache-2.0")
    files = hub.files("acme/once")
    assert files.keys() == OF_AN_SAE | {*SOURCE} | {"README.md", ".gitattributes"}
    assert own_commits(hub, "acme/once") == ["Upload SAE with hf_selortho"]
    assert hub.commits("acme/once")[0].oid in said and "from_pretrained('acme/once')" in said
    assert snapshot(run) == before  # nothing of it is touched
    assert files["model.safetensors"] == before["model.safetensors"]
    assert json.loads(files["metrics.json"]) == json.loads(before["metrics.json"])
    config = json.loads(files["config.json"])
    assert config.pop("auto_map")["AutoModel"] == "modeling_selortho.SelOrthoSAE"
    assert config == json.loads(before["config.json"])
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "license: apache-2.0\n" in card and "# `once`" in card

    sent = len(hub.asked("PUT", "/lfs/"))
    assert "has all of this already" in push(client, run, "acme/once", "--license", "apache-2.0")
    assert len(hub.commits("acme/once")) == 2 and len(hub.asked("PUT", "/lfs/")) == sent
    change_fvu(run, 0.2)
    said = push(client, run, "acme/once", "--license", "apache-2.0")
    assert said.startswith("2 files sent") and len(hub.asked("PUT", "/lfs/")) == sent  # metrics.json and the card


def change_fvu(run: Path, fvu: float) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["evaluation"]["fvu"] = fvu
    (run / "metrics.json").write_text(json.dumps(metrics))


def test_several_layers_are_one_repository_with_one_card(hub, client, tmp_path) -> None:
    run = tmp_path / "run"
    for layer in (2, 5):
        save_run(run / f"layer_{layer}", fvu=layer / 10, layer=layer)
        save_run(run / f"layer_{layer}_twin", fvu=layer / 20, layer=layer, ortho_coefficient=0.0)
    (run / "run.json").write_text(json.dumps({"command": "train.py", "arguments": {"layers": [2, 5]}}))
    (run / "metrics.json").write_text(json.dumps({"schema_version": 1, "saes": {}}))
    assert "subfolder='layer_2'" in push(client, run, "acme/layers")
    names = ["layer_2", "layer_2_twin", "layer_5", "layer_5_twin"]
    expected = {f"{name}/{file}" for name in names for file in OF_AN_SAE}
    files = hub.files("acme/layers")
    assert files.keys() == expected | {*SOURCE} | {"README.md", "run.json", "metrics.json", ".gitattributes"}
    card = files["README.md"].decode()
    assert "### Evaluation of `layer_5`" in card and "| FVU | 0.5000 | 0.2500 |" in card
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert len(pictures) == 4 and files.keys() >= set(pictures)
    code = """
from hf_selortho import SelOrthoSAE
from transformers import AutoConfig
print(SelOrthoSAE.from_pretrained("acme/layers", subfolder="layer_5").config.layer)
print(AutoConfig.from_pretrained("acme/layers", subfolder="layer_2_twin").ortho_coefficient)
"""
    assert client.run(code) == "5\n0.0\n"
    assert "with a subfolder where it has several" in client.failure(
        "from hf_selortho import SelOrthoSAE\nSelOrthoSAE.from_pretrained('acme/layers')"
    )


def test_a_dry_run_sends_nothing(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    before = len(hub.requests)
    said = push(client, run, "acme/dry", "--dry_run")
    assert len(hub.requests) == before and ("model", "acme/dry") not in hub.storage.repos
    sizes = dict(reversed(line.split()) for line in said.split("\nREADME.md:")[0].splitlines()[:-1])
    assert sizes.keys() == OF_AN_SAE | {*SOURCE} | {"README.md"}
    assert int(sizes["model.safetensors"].replace(",", "")) == (run / "model.safetensors").stat().st_size
    assert "\n## Limits and hazards\n" in said and "nothing was sent" in said


def test_branches_and_private_repositories(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    push(client, run, "acme/branch", "--private", "--revision", "try")
    assert hub.storage.repos["model", "acme/branch"].private
    assert own_commits(hub, "acme/branch") == [] and len(own_commits(hub, "acme/branch", "try")) == 1
    code = "from hf_selortho import SelOrthoConfig as C\nprint(C.from_pretrained('acme/branch', revision='try').layer)"
    assert client.run(code) == "2\n"


def test_a_proposal_is_made_once(hub, client, tmp_path) -> None:
    hub.create_repo("acme/proposed")
    run = save_run(tmp_path / "run")
    for _ in range(2):
        assert "/acme/proposed/discussions/1" in push(client, run, "acme/proposed", "--create_pr")
    assert own_commits(hub, "acme/proposed") == [] and hub.storage.repos["model", "acme/proposed"].proposals.keys() == {
        1
    }
    assert "model.safetensors" in hub.files("acme/proposed", "refs/pr/1")


def test_what_others_have_changed_is_not_overwritten(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    push(client, run, "acme/others")
    hub.commit("acme/others", {"README.md": b"---\n{}\n---\nmine", "notes.md": b"a note"})
    (run / "pictures/a.png").write_bytes(b"another picture")
    said = refused(client, run, "acme/others")
    assert "somebody else has changed README.md of acme/others since the last push" in said and "--overwrite" in said
    assert hub.files("acme/others")["pictures/a.png"] == b"png of a.png"
    push(client, run, "acme/others", "--overwrite")
    files = hub.files("acme/others")
    assert b"## Limits and hazards" in files["README.md"] and files["pictures/a.png"] == b"another picture"
    assert files["notes.md"] == b"a note"  # not ours


@pytest.mark.parametrize(
    ("name", "theirs", "squashed"),
    [
        ("config.json", b'{"model_type": "llama"}', False),
        ("config.json", b'{"model_type": "llama"}', True),  # the only commit that there is
        ("README.md", b"---\nlicense: mit\n---\n", False),
    ],
)
def test_repositories_that_were_never_pushed_to_are_left_alone(name, theirs, squashed, hub, client, tmp_path) -> None:
    repo = f"acme/theirs-{name[:6]}-{squashed}"
    hub.commit(repo, {name: theirs})
    if squashed:
        commits = hub.storage.repos["model", repo].commits
        head = hub.commits(repo)[0]
        commits[head.oid] = dataclasses.replace(head, parent=None)
    said = refused(client, save_run(tmp_path / "run"), repo)
    assert f"somebody else has changed {name} of {repo} since it was created" in said
    assert hub.files(repo)[name] == theirs


def test_twin_and_seeds_reach_the_card(hub, client, tmp_path) -> None:
    run, other = save_run(tmp_path / "x"), save_run(tmp_path / "y", seed=1, fvu=0.3)
    save_run(tmp_path / "x-twin", fvu=0.08, ortho_coefficient=0.0)
    push(client, run, "acme/compared", "--seeds", str(other))
    card = hub.files("acme/compared")["README.md"].decode()
    assert re.search(r"\| FVU \| 0\.1000 \| 0\.2000 ± 0\.141\d \| 0\.0800\d? \|", card)
    assert "over 2 seeds" in card


def test_the_feature_index_goes_along(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    assert "build the feature index first" in refused(client, run, "acme/index", "--include_index")
    (run / "feature_index").mkdir()
    (run / "feature_index/features.parquet").write_bytes(b"PAR1")
    push(client, run, "acme/index", "--include_index")
    assert hub.files("acme/index")["feature_index/features.parquet"] == b"PAR1"


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "pictures/c.png", "feature_index/features.parquet"])
def test_a_link_that_leads_out_of_the_run_is_refused(name, hub, client, tmp_path) -> None:
    run, elsewhere = save_run(tmp_path / "run"), tmp_path / "secret"
    elsewhere.write_text("{}")
    (run / "feature_index").mkdir()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(elsewhere)
    assert f"leads out of {run}" in refused(client, run, "acme/links", "--include_index")


def test_an_sae_publishes_itself(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    code = f"""
from hf_selortho import SelOrthoSAE
sae = SelOrthoSAE.from_pretrained({str(run)!r})
first = sae.push_to_hub("acme/itself", private=True, license="mit")
again = sae.push_to_hub("acme/itself", license="mit")
print(len(first.changed), again.changed, first.commit == again.commit)
"""
    assert client.run(code) == f"{5 + len(SOURCE)} () True\n"
    files = hub.files("acme/itself")
    assert files.keys() >= {"config.json", "model.safetensors", "README.md", "saelens/cfg.json"}
    assert b"license: mit" in files["README.md"] and b"## Evaluation" not in files["README.md"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "model.safetensors").write_bytes(bytes(100)), "is damaged or incomplete"),
        (lambda run: (run / "metrics.json").write_text('{"evaluation": {"fvu": "x"}}'), "what no training writes"),
        (lambda run: shutil.rmtree(run), "is no folder"),
        (lambda run: make_infinite(run), "W_dec of .* holds NaN or infinity"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_not_published(spoil, message, hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    spoil(run)
    before = len(hub.requests)
    assert re.search(message, refused(client, run, "acme/damaged"))
    assert len(hub.requests) == before


def make_infinite(run: Path) -> None:
    sae = SelOrthoSAE.from_pretrained(run)
    with torch.no_grad():
        sae.W_dec[3, 2] = torch.inf
    sae.save_pretrained(run)


@pytest.fixture
def training(tiny_lm_dir, sample_text_files, tmp_path) -> list[str]:
    """Arguments of a training of seconds."""
    settings = {
        "model": tiny_lm_dir("llama"), "lm_dtype": "float32", "layer": 1, "dataset": sample_text_files.csv, "d_sae": 64,
        "context_length": 32, "batch_size": 128, "buffer_contexts": 32, "refresh_every": 4, "max_steps": 3,
        "eval_samples": 8, "eval_ce_samples": 2, "output_dir": tmp_path / "run", "cpu": True, "push_to_hub": True,
    }  # fmt: skip
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def test_a_training_publishes_at_its_end(hub, client, training, tmp_path) -> None:
    done = client.script("train", *training, "--hub_model_id", "org/trained", "--hub_license", "mit")
    assert done.code == 0 and "sent to org/trained, in one commit" in done.out, done.err[-2000:]
    files = hub.files("org/trained")
    assert files["model.safetensors"] == (tmp_path / "run/model.safetensors").read_bytes()
    assert b"license: mit" in files["README.md"] and len(own_commits(hub, "org/trained")) == 1
    assert "has all of this already" in push(client, tmp_path / "run", "org/trained", "--license", "mit")


def test_a_training_that_cannot_be_published_is_not_lost(hub, client, training, tmp_path) -> None:
    client.run(f"import os\nos.environ['HF_TOKEN'] = {hub.read_token!r}")
    try:
        done = client.script("train", *training, "--hub_model_id", "org/refused")
    finally:
        client.run(f"import os\nos.environ['HF_TOKEN'] = {hub.token!r}")
    last = done.err.strip().splitlines()[-1]
    assert done.code == 2 and "may not write to org/refused" in last
    assert f"selortho push {tmp_path / 'run'} --repo_id org/refused" in last
    assert SelOrthoSAE.from_pretrained(tmp_path / "run").config.d_sae == 64


def test_mistakes_on_the_command_line(hub, client, tmp_path) -> None:
    run = save_run(tmp_path / "run")
    for repo in ("acme", "a b/c", "../x"):
        assert "expected owner/name" in refused(client, run, repo)
    done = client.script("push_to_hub", str(run))
    assert done.code == 2 and "--repo_id is missing" in done.err
    (tmp_path / "acts").mkdir()
    (tmp_path / "acts/manifest.json").write_text("{}")
    done = client.script("push_to_hub", str(tmp_path / "acts"), "--repo_id", "acme/x", "--include_index")
    assert done.code == 2 and "holds cached activations, and no SAE" in done.err
    done = client.script("push_to_hub", str(run), "--repo_id", "acme/x", "--overwirte")
    assert done.code == 2 and "unknown arguments: --overwirte" in done.err


@pytest.mark.slow
def test_before_a_training_it_is_asked_whether_it_can_be_published(hub, client, training, tmp_path) -> None:
    for repo, message in (("else/where", "who does not belong to 'else'"), ("x", "expected owner/name")):
        done = client.script("train", *training, "--hub_model_id", repo)
        assert done.code == 2 and message in done.err.splitlines()[-1] and not (tmp_path / "run").exists()
