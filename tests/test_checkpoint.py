"""checkpoint.py reads what it wrote, and refuses the rest in one line. (Crashes: test_crash.py.)"""
import argparse
import json

import pytest
import torch

import checkpoint
import discretize
import teachers
from conftest import RECIPES


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("disc", list(discretize.DISCRETIZERS))
def test_a_round_trip(tiny_trainer, tmp_path, disc, recipe):
    trainer = tiny_trainer("--disc", disc, "--recipe", recipe)
    checkpoint.save(tmp_path / "ckpt.pt", checkpoint.state_of(trainer))
    config, teacher, student = checkpoint.load_model(tmp_path / "ckpt.pt")
    assert config == checkpoint.config_of(trainer.args) and config["disc"] == disc
    assert not (student.training or teacher.training)
    assert not any(p.requires_grad for p in (*student.parameters(), *teacher.parameters()))
    x, own = torch.randn(20, 3, 8, 8), trainer.student.eval()
    with torch.no_grad():
        z_t = trainer.teacher(x)
        a, b = (s.describe(s.preprocess(z_t), hard=True) for s in (own, student))
        assert torch.equal(teacher(x), z_t) and torch.equal(a.ids, b.ids)
        assert torch.equal(own.interpret(a.embeddings), student.interpret(b.embeddings))


def test_what_cannot_be_loaded_is_one_line(tiny_trainer, tmp_path):
    state, file = checkpoint.state_of(tiny_trainer()), tmp_path / "ckpt.pt"
    config = state["config"]
    changes = {"vocab": state | {"config": config | {"vocab": 9}},
               "recipe": state | {"config": config | {"recipe": "other"}},
               "image_size": state | {"config": config | {"image_size": "8"}},
               "flag": state | {"config": {k: v for k, v in config.items() if k != "disc"}},
               "weights": state | {"student": {}}, "teacher": state | {"teacher": {}}}
    for name, changed in changes.items():
        torch.save(changed, file)
        with pytest.raises(ValueError, match="does not fit this version of the code") as error:
            checkpoint.load_model(file)
        assert "\n" not in str(error.value), name
    torch.save(teachers.small_vit(8, 4, 64, 1, 1).state_dict(), file)
    with pytest.raises(ValueError, match="is not a checkpoint of train.py"):
        checkpoint.load_model(file)
    with pytest.raises(FileNotFoundError, match="no file"):
        checkpoint.load_model(tmp_path / "none.pt")


def test_truncate_log_keeps_the_lines_of_the_checkpoint(tmp_path):
    log, lines = tmp_path / "metrics.jsonl", [json.dumps({"step": n}) + "\n" for n in (1, 2, 3)]
    log.write_bytes("".join(lines).encode() + b'\0\0\n{"step": 2}\n{"st')
    checkpoint.truncate_log(log, "step", 2)
    assert log.read_text() == lines[0] + lines[1] + '{"step": 2}\n'
    log.unlink()
    checkpoint.truncate_log(log, "step", 2)
    assert log.read_text() == ""


def test_a_new_run_does_not_inherit_results(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    args = argparse.Namespace(out=tmp_path, device="cpu")
    trainer = argparse.Namespace(epoch=0, steps_per_epoch=4, step_in_epoch=0)
    checkpoint.init_run_dir(args, trainer, fresh=False)
    assert (tmp_path / "results.json").exists()
    checkpoint.init_run_dir(args, trainer, fresh=True)
    assert {f.name for f in tmp_path.iterdir()} == {"metrics.jsonl", "config.json"}
