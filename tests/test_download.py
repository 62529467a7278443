"""tools/download.py: what is fetched, whether it arrived whole, and what is said without a network.

Must not use a network.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.checkpoint.fetch import RELEASED, Wanted, check, choose, plan

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "download.py"


def main(*argv):
    spec = importlib.util.spec_from_file_location("download", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(list(argv))


def test_a_name_and_a_size_become_paths_of_the_repository():
    wanted = plan("alpaca", config="", size="13B")
    assert wanted == Wanted("finetune/sg/alpaca", ("config/tokenizer.model", "config/13B_params.json"))
    assert plan("InternLM", group="convert/sg", config="internLM_").files[0] == "config/internLM_tokenizer.model"
    assert plan("SPHINX-1k", group="finetune/mm").folder == "finetune/mm/SPHINX/SPHINX-1k"
    assert plan(None, config="code_", size="34B") == Wanted(
        None, ("config/code_tokenizer.model", "config/code_34B_params.json")
    )


def test_every_name_of_the_seed_is_known():
    text = "alpacaLlava_llamaQformerv2Peft_13b alpacaLlava_llamaQformerv2_13b caption_llamaQformerv2_13b"
    assert set(text.split()) <= set(RELEASED["finetune/mm"])
    text = "alpaca alpaca_llamaPeft_normBias dialog_lima dialog_sharegpt dialog_sharegpt_70b dialog_wizardLM gorilla"
    assert set(text.split()) <= set(RELEASED["finetune/sg"])


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean dialog_lima"):
        plan("dialog_limo")
    with pytest.raises(ValueError, match="--train_type finetune --input_type mm"):
        plan("caption_llamaQformerv2_13b")
    with pytest.raises(ValueError, match="nothing to fetch"):
        plan(None)
    with pytest.raises(ValueError, match="--model_size: got '8B'"):
        plan("alpaca", size="8B")


def test_full_weights_are_chosen_unless_the_delta_is_asked_for_or_all_there_is():
    folder = "finetune/sg/alpaca"
    full, delta = f"{folder}/consolidated.00-of-01.model.pth", f"{folder}/consolidated.00-of-01.model-diff.pth"
    small, state = f"{folder}/config.json", f"{folder}/consolidated.00-of-01.optimizer.pth"
    every = [full, delta, small, state]
    assert choose(every, Wanted(folder, ())) == [small, full]
    assert choose(every, Wanted(folder, (), delta=True)) == [small, delta]
    assert choose([delta, small], Wanted(folder, ())) == [small, delta]
    with pytest.raises(ValueError, match="no delta weights"):
        choose([full], Wanted(folder, (), delta=True))
    with pytest.raises(ValueError, match="no weights"):
        choose([small], Wanted(folder, ()))
    with pytest.raises(ValueError, match="outside"):
        choose([full, f"{folder}/../../x"], Wanted(folder, ()))


def test_a_fetched_file_is_compared_with_the_hubs_size_and_digest(tmp_path):
    path, content = tmp_path / "file", b"weights"
    path.write_bytes(content)
    large = hashlib.sha256(content).hexdigest()
    small = hashlib.sha1(b"blob 7\0weights").hexdigest()
    assert check(path, size=7, digest=large) is None and check(path, size=7, digest=small) is None
    assert "has 7 bytes instead of 8" in check(path, size=8, digest=large)
    path.write_bytes(b"Weights")
    assert "digest" in check(path, size=7, digest=large) and "digest" in check(path, size=7, digest=small)
    path.unlink()
    assert check(path, size=7, digest=large) == "is missing"


def test_a_dry_run_says_what_would_be_fetched(tmp_path, capsys):
    main("--model_name", "gorilla", "--down_config", "--down_diff", "--output_path", str(tmp_path), "--dry_run")
    out = capsys.readouterr().out
    assert "finetune/sg/gorilla/*.model-diff.*" in out and "config/7B_params.json" in out and str(tmp_path) in out
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="got both"):
        main("--down_code", "--down_internLM")


def test_without_a_network_one_line_names_what_was_to_be_fetched(tmp_path):
    command = [sys.executable, str(TOOL), "--model_name", "alpaca", "--down_config", "--output_path", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    for words in ("cannot be reached", "finetune/sg/alpaca", "config/tokenizer.model", "config/7B_params.json"):
        assert words in done.stderr
