"""Text and pictures to the model's inputs, and its answers back to text."""

from __future__ import annotations

from typing import Any

from transformers import ImageProcessingMixin, PreTrainedTokenizerBase
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from dualview.arguments import check_count, shown

SYSTEM_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

CHAT_TEMPLATE = (
    "{% if tools %}"
    "{{ raise_exception('tools: the model was not trained to call any. Describe them in the text, or omit them.') }}"
    "{% endif %}"
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM_PROMPT.replace("'", "\\'") + "<|eot_id|>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] not in ('image', 'text') %}"
    "{{ raise_exception('a part of type ' + part['type'] + ': the model takes parts of type image and text.') }}"
    "{% endfor %}"
    "{% set images = message['content'] | selectattr('type', 'equalto', 'image') | list %}"
    "{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | list %}"
    "{% set text = '<image>\n' * (images | length) + texts | join('') %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ text + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ text + '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The Llama-3 chat format with the system prompt of the released model; images come before the text of their turn."""


class InfLlavaProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one: each ``<image>`` in the text becomes ``image_seq_length`` tokens.

    The number does not depend on the picture or its grid.

    Args:
        image_processor: An `InfLlavaImageProcessor`.
        tokenizer: The language model's tokenizer; it must know ``image_token`` as one token.
        image_seq_length: Image tokens per image, as in the model's configuration.
        image_token: The token that stands for an image in the text.
        chat_template: A chat template in place of the released model's, which is in the Llama-3 format.
        **kwargs: As for every processor of transformers.

    Raises:
        ValueError: There is no tokenizer, or it does not know ``image_token`` as one token.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        image_seq_length: int = 576,
        image_token: str = "<image>",
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_seq_length, self.image_token = check_count(image_seq_length, "image_seq_length"), image_token
        if not isinstance(image_token, str) or not image_token:
            raise ValueError(f"image_token={shown(image_token)}: must be the text of a token.")
        if not isinstance(image_processor, ImageProcessingMixin):
            raise ValueError(f"image_processor={shown(image_processor)}: must be an InfLlavaImageProcessor.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ValueError(
                f"tokenizer={shown(tokenizer)}: InfLlavaProcessor joins an image processor to the language model's "
                "tokenizer. Pass both; for pictures alone use InfLlavaImageProcessor."
            )
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1 or (ids[0] == tokenizer.unk_token_id and image_token != tokenizer.unk_token):
            raise ValueError(
                f"image_token={shown(image_token)}: the tokenizer turns {image_token!r} into "
                f"{tokenizer.convert_ids_to_tokens(ids)}, and it must be one token of its own: add it first, with "
                f"tokenizer.add_special_tokens({{'additional_special_tokens': [{image_token!r}]}})."
            )
        self.image_token_id = ids[0]
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """The text that stands for one image: ``image_seq_length`` image tokens."""
        return self.image_token * self.image_seq_length

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        """As for every processor; and every image has its place, in the prompt that it is given for.

        Raises:
            ValueError: The prompts have more or fewer places than images, or places for those of other prompts.
        """
        if text is not None and all(isinstance(each, str) for each in text):
            places = [each.count(self.image_token) for each in ([text] if isinstance(text, str) else text)]
            given = [] if images is None else images
            if isinstance(given, (list, tuple)) and any(isinstance(each, (list, tuple)) for each in given):
                counts = [len(each) if isinstance(each, (list, tuple)) else 1 for each in given]
                fits, what = counts == places, f"images by prompts: {counts}"
            else:
                count = len(make_flat_list_of_images(given)) if images is not None else 0
                fits, what = count == sum(places), f"{count} images"
            if not fits:
                raise ValueError(
                    f"{what}, but the prompts have {places} {self.image_token!r}: the number of {self.image_token} "
                    "tokens in the prompts should be the same as the number of images, prompt by prompt where they are "
                    "nested, as [[first], [second, third]]."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = self.image_processor.get_number_of_image_patches
        return MultiModalData(
            num_image_tokens=[self.image_seq_length] * len(image_sizes),
            num_image_patches=[count(height, width, kwargs) for height, width in image_sizes],
        )
