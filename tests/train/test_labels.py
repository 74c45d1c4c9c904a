"""What is learnt, token by token: captions and answers with their ends, and nothing else."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dualview.models import InfLlavaImageProcessor, InfLlavaProcessor
from dualview.train.labels import check_processor, tokens_of
from dualview.train.rows import Row, RowError, Turn
from tests.tiny import tiny_processor, tiny_tokenizer

HEAD, END = ["<|start_header_id|>"], ["<|end_header_id|>", "\n", "\n"]
ONE = [Turn("user", "<image>\nhi"), Turn("assistant", "a cat"), Turn("user", "so"), Turn("assistant", "yes")]
SHORT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else '' }}{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ text + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ text }}{% endif %}{% endfor %}"
)


def row(*turns, images=1):
    return Row("rows.json, row 0", tuple(range(images)), turns)


def learnt(tokens, processor):
    """Pairs of a token's text and whether it is learnt, where the label is the token itself."""
    assert all(label in (-100, token) for token, label in zip(tokens.ids, tokens.labels, strict=True))
    texts = processor.tokenizer.convert_ids_to_tokens(tokens.ids)
    return list(zip(texts, (label != -100 for label in tokens.labels), strict=True))


def test_a_conversation_in_the_format_of_llama_3():
    found = learnt(tokens_of(row(*ONE), processor := tiny_processor(), "chat"), processor)
    system = found.index(("<|eot_id|>", False)) + 1
    assert not any(is_learnt for _, is_learnt in found[:system])
    assert found[system:] == [
        *((text, False) for text in [*HEAD, *"user", *END, *["<image>"] * 4, *"\nhi", "<|eot_id|>"]),
        *((text, False) for text in [*HEAD, *"assistant", *END]),
        *((text, True) for text in [*"a cat", "<|eot_id|>"]),
        *((text, False) for text in [*HEAD, *"user", *END, *"so", "<|eot_id|>", *HEAD, *"assistant", *END]),
        *((text, True) for text in [*"yes", "<|eot_id|>"]),
    ]


def test_what_is_not_learnt_is_the_prompt_of_generation():
    """The tokens before the first answer are those that `apply_chat_template` gives when it asks for one."""
    processor = tiny_processor()
    tokens = tokens_of(row(*ONE), processor, "chat")
    first = next(i for i, label in enumerate(tokens.labels) if label != -100)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    text = text.replace("<image>", "<image>" * 4)
    assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == tokens.ids[:first]


def test_a_caption():
    turns = Turn("user", "Describe <image>"), Turn("assistant", "a cat")
    found = learnt(tokens_of(row(*turns), processor := tiny_processor(), "plain"), processor)
    assert found == [(text, False) for text in ["<s>", *["<image>"] * 4]] + [(text, True) for text in "a cat\n"]


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("<image>\n<image>\nhi", "IIhi"),
        ("hi<image>", "hiI"),
        ("<image> is it <image>\n so", "I is it I so"),
        ("  hi you \n", "hi you"),
        ("<image>", "I"),
    ],
)
def test_images_stand_where_the_template_puts_them(text, order):
    """Of a template that keeps the order of parts; that of INF-LLaVA puts images first."""
    from dualview.train.labels import message_of

    parts = message_of(Turn("user", text))["content"]
    assert "".join("I" if part["type"] == "image" else part["text"] for part in parts) == order


def test_any_template_with_markers_and_several_images():
    processor = InfLlavaProcessor(InfLlavaImageProcessor(size=84), tiny_tokenizer(), 4, chat_template=SHORT_TEMPLATE)
    turns = Turn("user", "<image>\n<image>\nhi"), Turn("assistant", "no")
    assert learnt(tokens_of(row(*turns, images=2), processor, "chat"), processor) == [
        *((text, False) for text in ["u", *["<image>"] * 8, *"hi", "a"]),
        *((text, True) for text in [*"no", "<|eot_id|>"]),
    ]


def test_an_image_right_after_an_answer():
    template = SHORT_TEMPLATE.replace("{{ message['role'][0] }}", "")
    processor = InfLlavaProcessor(InfLlavaImageProcessor(size=84), tiny_tokenizer(), 4, chat_template=template)
    turns = Turn("user", "hi"), Turn("assistant", "no"), Turn("user", "<image>"), Turn("assistant", "a")
    assert learnt(tokens_of(row(*turns), processor, "chat"), processor) == [
        *((text, False) for text in "hi"),
        *((text, True) for text in [*"no", "<|eot_id|>"]),
        *((text, False) for text in ["<image>"] * 4),
        *((text, True) for text in ["a", "<|eot_id|>"]),
    ]


def byte_level_processor():
    """Tokens of several characters, and characters of several tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<image>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(["the answer is the answer"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<|eot_id|>")
    fast.add_special_tokens({"additional_special_tokens": special[1:]})
    return InfLlavaProcessor(InfLlavaImageProcessor(size=84), fast, 4)


@pytest.mark.parametrize("answer", ["the answer", "ça va? \U0001f600", " the", "an\nswer", "the " * 40])
def test_tokens_of_several_characters(answer):
    processor = byte_level_processor()
    tokens = tokens_of(row(Turn("user", "<image>\né \U0001f600"), Turn("assistant", answer)), processor, "chat")
    kept = [label for label in tokens.labels if label != -100]
    assert processor.tokenizer.decode(kept) == answer + "<|eot_id|>"
    assert tokens.labels[-len(kept) :] == kept


def test_cut_to_a_length():
    processor, whole = tiny_processor(), tokens_of(row(*ONE), tiny_processor(), "chat")
    cut = tokens_of(row(*ONE), processor, "chat", len(whole.ids) - 2)
    assert (cut.ids, cut.labels) == (whole.ids[:-2], whole.labels[:-2])
    with pytest.raises(RowError, match=r"row 0: \d+ tokens, and max_length=150 cuts through an image"):
        tokens_of(row(Turn("user", "a" * 150 + "<image>"), *ONE[1:]), byte_level_processor(), "chat", 150)
    with pytest.raises(RowError, match="row 0: nothing is left to learn in 180 tokens"):
        tokens_of(row(*ONE), processor, "chat", 180)


def test_what_cannot_be_done_is_said():
    processor = tiny_processor()
    processor.chat_template = "{{ messages }}"
    check_processor(processor, "plain")
    with pytest.raises(ValueError, match=r"does not mark answers.*generation %}"):
        check_processor(processor, "chat")
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        check_processor(processor, "plain")
    with pytest.raises(RowError, match="the text has the token '<image>'"):
        tokens_of(row(Turn("user", "hi"), Turn("assistant", "a <image>"), images=0), tiny_processor(), "chat")
