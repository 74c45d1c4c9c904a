"""From released weights to an answer, as typed: convert, ask, chat."""

import io
import json
import shutil
import subprocess
import sys

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from dualview import cli
from dualview.answers import reduced
from dualview.chat import Chat, QuestionError, to_inputs
from dualview.images import load_image, to_image
from dualview.models import InfLlavaConfig
from tests.checks import refuses
from tests.released import write_released
from tests.tiny import photograph


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    write_released(folder / "released", files=2)
    photograph(60, 90).save(folder / "photo.png")
    assert cli.main(["convert", str(folder / "released"), str(folder / "model")]) == 0
    return folder


def answers(place, *questions, size=None):
    """What `generate` says in a conversation, all at once and without the command."""
    processor = AutoProcessor.from_pretrained(place / "model")
    model = AutoModelForImageTextToText.from_pretrained(place / "model").eval()
    messages, found = [], []
    for question in questions:
        content = [{"type": "image", "image": load_image(place / "photo.png")}] if not messages else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        options = {"images_kwargs": {"size": {"shortest_edge": size}}} if size else {}
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs=options,
        )  # fmt: skip
        out = model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
        found.append(processor.decode(out, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": [{"type": "text", "text": found[-1]}]})
    return found


def printed(text, out):
    """Whether text is what was printed, with what is not printable escaped."""
    from dualview.terminal import printable

    return "".join(out.split()) == "".join(printable(text).split())


def test_convert_says_what_it_does(place, tmp_path, capsys):
    assert cli.main(["convert", str(place / "released"), str(tmp_path / "model")]) == 0
    out = capsys.readouterr().out
    assert "100 % of 0.0 GiB" in out
    assert f"dualview ask PICTURE QUESTION --model {tmp_path / 'model'}" in out
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "back")]) == 0
    assert cli.main(["convert", str(tmp_path / "model"), str(tmp_path / "back")]) == 1
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("size", [None, 28])
def test_ask(place, capsys, size):
    argv = ["ask", str(place / "photo.png"), "what is this", "--model", str(place / "model"), "--max-new-tokens", "12"]
    assert cli.main([*argv, *(["--size", str(size)] if size else [])]) == 0
    (expected,) = answers(place, "what is this", size=size)
    assert printed(expected, capsys.readouterr().out)


def test_chat_goes_on(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this\n\n and now \n"))
    argv = ["chat", str(place / "photo.png"), "--model", str(place / "model"), "--max-new-tokens", "12"]
    assert cli.main(argv) == 0
    expected = answers(place, "what is this", "and now")
    assert printed("".join(expected), capsys.readouterr().out)


def test_an_answer_comes_piece_by_piece(place):
    """The first piece is there before the last token is computed."""
    chat, pieces, seen = Chat(str(place / "model"), place / "photo.png", max_new_tokens=40), [], []
    chat.model.register_forward_pre_hook(lambda *_: seen.append(len(pieces)))
    letters = set(chat.processor.tokenizer.encode("a b", add_special_tokens=False))
    others = [token for token in range(chat.model.config.text_config.vocab_size) if token not in letters]
    chat.model.generation_config.update(do_sample=True, suppress_tokens=others)
    answer = chat.ask("what", pieces.append)
    assert "".join(pieces) == answer
    assert len(pieces) > 2
    assert max(seen) > 0
    assert chat.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": answer}]}


def test_text_alone(place):
    chat = Chat(str(place / "model"), max_new_tokens=3)
    assert isinstance(chat.ask("hello", lambda _: None), str)
    assert [part["type"] for part in chat.messages[0]["content"]] == ["text"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "{}/none.png", "what", "--model", "{}/model"], "no such file"),
        (["ask", "{}/photo.png", "what", "--model", "{}/released"], "dualview convert"),
        (["ask", "{}/photo.png", "what", "--model", "{}/nowhere"], "nowhere"),
        (["convert", "{}/none", "{}/new"], "no such file"),
        (["convert", "{}/photo.png", "{}/new"], "cannot be read as weights"),
    ],
)
def test_bad_input_is_one_line(place, argv, message, capsys):
    assert cli.main([part.format(place) for part in argv]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.strip().count("\n") == 0, err
    assert not (place / "new").exists()


def test_a_model_that_is_not_found_is_named(place, monkeypatch):
    def refuse(name):
        raise OSError("We couldn't connect")

    monkeypatch.setattr(InfLlavaConfig, "get_config_dict", refuse)
    with refuses("model nobody/none: cannot be loaded; give a directory or a name on the hub: We couldn't connect"):
        Chat("nobody/none")


def test_loading_shows_its_progress(place):
    done = subprocess.run(
        [sys.executable, "-m", "dualview", "ask", place / "photo.png", "what", "--model", place / "model",
         "--max-new-tokens", "2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    assert "Loading" not in done.stdout
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("layers", [1, 3])
def test_weights_of_another_configuration_do_not_answer(place, tmp_path, layers):
    """With layers left out, or with random ones."""
    shutil.copytree(place / "model", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["num_hidden_layers"] = layers
    file.write_text(json.dumps(config))
    name = "model.language_model.layers."
    with refuses("weights and config.json do not belong together", name, "more", "Make the directory again"):
        Chat(str(tmp_path / "model"))


def test_ask_compares_with_the_low_resolution_view_and_reports(place, tmp_path, capsys):
    """The second answer is that about the picture at the size of one tile."""
    report, argv = tmp_path / "report.html", ["--model", str(place / "model"), "--max-new-tokens", "12"]
    asked = ["ask", str(place / "photo.png"), "what is this", *argv]
    assert cli.main([*asked, "--compare", "low-res", "--report", str(report)]) == 0
    said = capsys.readouterr().out
    small, grid = Chat(str(place / "model"), place / "photo.png").shown()
    assert small.shape[1:] == tuple(28 * n for n in grid)
    to_image(reduced(small, grid)).save(tmp_path / "small.png")
    assert cli.main(["ask", str(tmp_path / "small.png"), *asked[2:]]) == 0
    of_small = capsys.readouterr().out.strip()
    (of_full,) = answers(place, "what is this")
    assert printed(f"with tiles:{of_full}low resolution:{of_small}wrote{report}", said)
    assert "with tiles" in report.read_text(encoding="utf-8")


def test_a_report_that_cannot_be_written_is_refused_before_the_model_is_loaded(place, tmp_path, capsys):
    asked = ["ask", str(place / "photo.png"), "what", "--model", str(tmp_path / "none")]
    assert cli.main([*asked, "--report", str(tmp_path / "report.pdf")]) == 1
    assert "is not .html" in capsys.readouterr().err
    same = tmp_path / "photo.html"
    same.write_bytes((place / "photo.png").read_bytes())
    assert cli.main(["ask", str(same), *asked[2:], "--report", str(same)]) == 1
    assert "would be overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("mark", ["<image>", "<|eot_id|>", "\udcff"])
def test_what_is_no_text_is_not_asked(place, capsys, mark):
    chat = Chat(str(place / "model"), place / "photo.png", max_new_tokens=2)
    with refuses(repr(f"is it {mark}?"), "leave it out" if mark[0] == "<" else "no text", error=QuestionError):
        chat.ask(f"is it {mark}?", lambda _: None)
    assert chat.messages == []
    assert isinstance(chat.ask("is it", lambda _: None), str)
    assert cli.main(["ask", str(place / "photo.png"), f"is it {mark}?", "--model", str(place / "model")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("dualview ask: error: question 'is it ")


def test_a_conversation_goes_on_after_what_could_not_be_asked(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is this\n<image>\nand now\n"))
    argv = ["chat", str(place / "photo.png"), "--model", str(place / "model"), "--max-new-tokens", "12"]
    assert cli.main(argv) == 0
    said = capsys.readouterr()
    assert printed("".join(answers(place, "what is this", "and now")), said.out)
    assert said.err.splitlines()[-1].startswith("question '<image>': '<image>' is a token")


def test_a_conversation_ends_where_the_model_has_no_place_for_more(place):
    chat, tokens = Chat(str(place / "model"), max_new_tokens=12), []
    chat.model.register_forward_pre_hook(lambda *_: tokens.append(1))
    prompt = to_inputs(chat, [{"role": "user", "content": [{"type": "text", "text": "what"}]}])["input_ids"].shape[1]
    chat.model.config.text_config.max_position_embeddings = prompt + 2
    chat.model.generation_config.eos_token_id = None
    chat.ask("what", lambda _: None)
    assert len(tokens) == 2
    with refuses("'and now'", f"takes {prompt + 2} with its answer", "fewer words", error=QuestionError):
        chat.ask("and now", lambda _: None)
    assert len(chat.messages) == 2


def test_questions_that_cannot_be_read(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"what \xe9\n"), encoding="utf-8"))
    assert cli.main(["chat", "--model", str(place / "model")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("dualview chat: error: standard input is no text in utf")


def test_no_model_is_loaded_where_nothing_can_be_asked(place, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["chat", "--model", str(place / "no model")]) == 1
    assert capsys.readouterr().err.startswith("dualview chat: error: standard input is closed: give the questions")
