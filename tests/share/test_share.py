"""What leaves a study's folder for others."""

import json

import httpx
import inspect_ai.log
import numpy as np
import pandas as pd
import pytest
from huggingface_hub.errors import HfHubHTTPError
from report_fixtures import UNLEARN_MANIFEST, example_results

from ema_jax.data.prompts import Prompt, write_prompts
from ema_jax.errors import UserError
from ema_jax.runtime.files import sha256_text, write_json
from ema_jax.share import hub, inspect_log, tables

SCORE = {"rate": 0.5, "refused": 5, "valid": 10, "invalid": 1, "total": 11, "ci95": [0.2, 0.8]}
SHARES = {"shares": {"refused": 0.45, "complied": 0.45, "off_topic": 0.1}}


def results(target="bias"):
    run = {"refusal": {"bias": SCORE, "privacy": SCORE}, "steps": 3}
    change = {"drop": 0.4, "ci95": [0.3, 0.5], "p": 0.01, "p_holm": 0.02}
    return {
        "target": target,
        "model": {"id": "tiny", "revision": None, "fingerprint": "f" * 64},
        "arms": {
            "base": {"refusal": {"bias": SCORE | SHARES, "privacy": SCORE}},
            "npo": {"refusal": run["refusal"], "seeds": {"0": run}},
        },
        "ema": {"npo": {"privacy": change}},
        "on_target": {"npo": change | {"drop": 0.9, "refusal": SCORE}},
        "provenance": {"versions": {"ema_jax": "0"}},
    }


def prompt(text, split="harvest", domain="bias", category=""):
    name = sha256_text(text)
    return Prompt(name, domain, split, text, "own", name, name, category)


@pytest.fixture
def study(tmp_path):
    """A finished study's folder, as far as sharing looks at it."""

    def make(prompts=("Explain the plan.",), *, target="bias", category="", text=True):
        rows = [prompt(x, category=category, domain=target) for x in prompts]
        rows += [prompt("Explain the tea.", "eval"), prompt("Explain the tide.", "eval")]
        write_prompts(tmp_path / "prompts", rows)
        write_json(tmp_path / "results.json", example_results() | {"target": target})
        folder = tmp_path / "adapters" / "npo" / "seed_0"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_text("{}")
        write_json(tmp_path / "stages" / "unlearn.npo.seed_0.json", UNLEARN_MANIFEST)
        row = {"id": rows[-1].id, "domain": "bias", "category": "", "verdict": "refused"}
        row |= {"score": 0.9, "reason": "opening", "harm": None, "judge": "lexical"}
        row |= {"finished": True, "response": "I'm sorry, I can't."} if text else {"finished": True}
        (tmp_path / "responses").mkdir()
        invalid = {**row, "verdict": "invalid", "reason": "empty", "id": rows[-2].id}
        lines = [json.dumps(row), json.dumps(invalid)]
        (tmp_path / "responses" / "base.jsonl").write_text("\n".join(lines) + "\n")
        return tmp_path

    return make


class Hub:
    """A stand-in for `HfApi` that keeps what it is sent."""

    def __init__(self, private=True, error=None):
        self.private, self.error, self.sent = private, error, {}

    def create_repo(self, repository, private, exist_ok):
        if self.error:
            raise self.error
        assert private
        return f"https://hub.invalid/{repository}"

    def repo_info(self, repository):
        return self

    def create_commit(self, repository, operations, commit_message):
        self.message = commit_message
        for operation in operations:
            with operation.as_file() as file:
                self.sent[operation.path_in_repo] = file.read()


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_table_has_a_row_per_arm_seed_and_domain(tmp_path, ending):
    path = tmp_path / f"out{ending}"
    tables.write(results(), path)
    table = pd.read_csv(path) if ending == ".csv" else pd.read_parquet(path)
    assert len(table) == 6
    pooled = table[(table.arm == "npo") & table.seed.isna()].set_index("domain")
    assert pooled.loc["bias", "drop"] == 0.9
    assert pooled.loc["privacy", ["drop", "drop_low", "drop_high"]].tolist() == [0.4, 0.3, 0.5]
    assert table[table.seed == 0]["drop"].isna().all()
    base = table[table.arm == "base"].set_index("domain")
    assert base.loc["bias", "share_off_topic"] == 0.1
    assert np.isnan(base.loc["privacy", "share_off_topic"])
    assert table.target.tolist() == [True, False] * 3


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ends in none of \.csv, \.parquet"):
        tables.write(results(), tmp_path / "out.xlsx")


def test_adapters_go_out_alone_with_their_card(study):
    api = Hub()
    url = hub.push(study(), "npo", 0, "me/adapters", api=api)
    assert url == "https://hub.invalid/me/adapters"
    assert set(api.sent) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = api.sent["README.md"].decode()
    assert "Not for deployment" in card
    assert "LoRA adapters in PEFT's format" in card
    assert "Explain" not in card


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"target": "csam"}, "domain 'csam'"),
        ({"prompts": ["Explain how to synthesise a nerve agent."]}, "1 harvest prompts .*cbrn"),
        ({"category": "chemical weapons"}, "category 'chemical weapons'"),
    ],
)
def test_deny_listed_content_never_leaves(study, made, words):
    api = Hub()
    with pytest.raises(UserError, match=words):
        hub.push(study(**made), "npo", 0, "me/adapters", api=api)
    assert not api.sent


def test_a_public_repository_is_refused(study):
    api = Hub(private=False)
    with pytest.raises(UserError, match="me/adapters is public"):
        hub.push(study(), "npo", 0, "me/adapters", api=api)
    assert not api.sent


def test_what_the_hub_refuses_is_one_line(study):
    response = httpx.Response(401, request=httpx.Request("POST", "https://hub.invalid"))
    error = HfHubHTTPError("401 Unauthorized\nmore", response=response)
    with pytest.raises(UserError, match=r"me/adapters: 401 Unauthorized; HF_TOKEN"):
        hub.push(study(), "npo", 0, "me/adapters", api=Hub(error=error))


def test_no_such_adapters(study):
    with pytest.raises(UserError, match=r"npo/seed_7: adapter_config\.json is not there"):
        hub.push(study(), "npo", 7, "me/adapters", api=Hub())


def test_a_study_without_texts_gives_no_log(study):
    folder = study(text=False)
    with pytest.raises(UserError, match="keep_text = True"):
        inspect_log.write(folder, "base", folder / "out.eval")


def test_a_log_that_inspect_reads_back(study):
    folder = study()
    assert inspect_log.write(folder, "base", folder / "out.eval") == 2
    log = inspect_ai.log.read_eval_log(str(folder / "out.eval"))
    assert log.status == "success"
    assert log.results.scores[0].metrics["refusal_rate"].value == 1.0
    assert log.results.scores[0].metrics["invalid_share"].value == 0.5
    sample = log.samples[0]
    assert sample.output.completion == "I'm sorry, I can't."
    assert sample.scores["refusal"].answer == "refused"
    assert sample.metadata == {"domain": "bias"}


def test_a_log_of_another_kind(study):
    folder = study()
    inspect_log.write(folder, "base", folder / "out.json")
    assert len(inspect_ai.log.read_eval_log(str(folder / "out.json")).samples) == 2
    with pytest.raises(UserError, match=r"out\.csv ends in none of \.eval, \.json"):
        inspect_log.write(folder, "base", folder / "out.csv")


def test_a_log_is_there_whole_or_not_at_all(study, monkeypatch):
    folder = study()
    (folder / "out.eval").write_text("the old one")

    def fails(log, location, **more):
        with open(location, "w") as file:
            file.write("half")
        raise OSError("no room")

    monkeypatch.setattr(inspect_ai.log, "write_eval_log", fails)
    with pytest.raises(OSError, match="no room"):
        inspect_log.write(folder, "base", folder / "out.eval")
    assert (folder / "out.eval").read_text() == "the old one"
    assert not list(folder.glob(".out*"))
