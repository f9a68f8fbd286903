"""`headwater generate --chat` with a run that has no chat template in its rows."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_tiny_llama, make_tiny_tokenizer

from headwater.cli import main
from headwater.data.conversation import for_conversation
from headwater.data.encode import DataSpec

RUN = """\
model_name_or_path: {folder}/model
tasks: [{{name: a, train: a.jsonl}}]
data: {{chat_template: never, max_length: 77}}
training: {{use_cpu: true}}
output_dir: {folder}
"""


@pytest.fixture
def run_folder(tmp_path):
    make_tiny_llama().save_pretrained(tmp_path / "model")
    make_tiny_tokenizer().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    adapted = get_peft_model(make_tiny_llama(), LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "config.yaml").write_text(RUN.format(folder=tmp_path))
    return tmp_path


def test_a_prompt_in_chat_form_gets_the_template_though_the_rows_had_none(run_folder, capsys):
    def answer(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["generate", str(run_folder), *arguments, "--max-new-tokens", "8"])
        captured = capsys.readouterr()
        assert not caught.value.code, captured.err
        return captured.out

    chat, written_out = answer("-p", "hi", "--chat"), answer("-p", "<|user|>hi<eos><|assistant|>")
    assert chat == written_out != answer("-p", "hi")


def test_only_never_gives_way_and_only_it():
    for template, meant in (("never", "auto"), ("auto", "auto"), ("always", "always")):
        spec = DataSpec(chat_template=template, max_length=77)
        assert for_conversation(spec) == DataSpec(chat_template=meant, max_length=77)
        assert spec.chat_template == template
