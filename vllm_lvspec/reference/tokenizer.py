"""The reference pair's tokenizer: byte-level BPE in which every word of the captions is one token."""

from __future__ import annotations

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from vllm_lvspec.bench.videofacts.scene import Scene
from vllm_lvspec.bench.videofacts.tasks import TASKS, image_task, make_task

END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", END_OF_TURN, "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

# A user's turn, as the chat template writes it: the first, what is asked, the second, and then the answer.
USER_TURN, ASSISTANT_TURN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
# What is seen comes before what is said, as in training, whatever the order in which a client sends it.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% endif %}{% endfor %}{% for part in message['content'] %}{% if 'text' in part %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(num_scenes: int = 3000) -> PreTrainedTokenizerFast:
    """Train on the tasks of the first `num_scenes` scenes; any other text falls back to bytes."""

    def corpus():
        for seed in range(num_scenes):
            rng = np.random.default_rng([seed, 11])
            scene = Scene.from_seed(seed)
            for task in [make_task(scene, kind, rng) for kind in TASKS] + [image_task(scene, rng)]:
                yield f"user\n{task.prompt}"
                yield f"assistant\n{task.answer.text}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, initial_alphabet=alphabet, show_progress=False, special_tokens=list(SPECIAL_TOKENS)
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (END_OF_TURN, "<|endoftext|>")],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def greedy(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy until the turn ends."""
    return GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False, bos_token_id=None
    )
