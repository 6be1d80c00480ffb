"""Prompts: what each side reads, token by token, under templates of the ChatML, Llama 3 and Qwen3 kinds."""

import json
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from atesd.data.problems import Problem, load_problems
from atesd.data.prompts import PromptBuilder, PromptTemplates, PromptTooLong
from atesd.data.segmentation import Reference, split_reference

TEMPLATES = Path(__file__).parent / "chat_templates"
OWN = ["default_system", "headers_and_bos", "thinking"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>"]
SPECIAL += ["<|end_header_id|>", "<|eot_id|>", "<think>", "</think>"]
PROBLEM = Problem("p-1", "What is {answer} in $\\frac{1}{2}$ of {reference}?", "", "10")
REFERENCE = split_reference("Add: 2 + 3 = 5. Then double {problem}.\nTwice that is 10.\n\n#### 10", None)
ALPHAS = [0.0, 0.3, 0.5, 0.99, 1.0]


@pytest.fixture(scope="module")
def backend():
    """A byte-level BPE whose merges cross spaces as those of real models do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    text = [
        "The final answer is step by step. Then twice that is 10.\n\nassistant user system reference solution\n"
    ] * 8
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    bos = "<|begin_of_text|>"  # added by the tokenizer itself, as Llama's does, unless it is told not to
    special = [(bos, tokenizer.token_to_id(bos))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return tokenizer.to_str()


def make_tokenizer(backend, template, eos="<|im_end|>"):
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend),
        bos_token="<|begin_of_text|>",
        eos_token=eos,
        pad_token="<|endoftext|>",
        chat_template=template,
    )


def read_template(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def builder_of(tokenizer, templates=None, **settings):
    limits = {"max_prompt_length": 600, "max_completion_length": 100, "context_length": 2000, **settings}
    return PromptBuilder(tokenizer, templates, **limits)


def chat(tokenizer, content, system=None, **kwargs):
    """The prompt built the short way, to compare with."""
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trl_templates():
    """Chat templates of real models, as the trl wheel ships them."""
    trl = pytest.importorskip("trl", reason="the real Qwen and Llama templates come with trl")
    return Path(trl.__file__).parent / "chat_templates"


@pytest.mark.parametrize("name", OWN)
def test_full_exposure_is_exactly_the_full_solution_prompt(backend, name):
    tokenizer = make_tokenizer(backend, read_template(name))
    templates = PromptTemplates()
    expected = (
        PROBLEM.problem
        + "\n\nHere is a reference solution to this problem:\n\n"
        + "Add: 2 + 3 = 5. Then double {problem}.\nTwice that is 10.\n\n#### 10"
        + "\n\n"
        + templates.transition
    )
    builder = builder_of(tokenizer)
    assert builder.teacher_text(PROBLEM, REFERENCE, 1.0) == expected
    assert builder.teacher(PROBLEM, REFERENCE, 1.0) == chat(tokenizer, expected)


def test_at_no_exposure_the_teacher_sees_the_answer_and_no_word_of_a_reference(backend):
    text = builder_of(make_tokenizer(backend, read_template("thinking"))).teacher_text(PROBLEM, REFERENCE, 0.0)
    shown = text.replace(PROBLEM.problem, "")
    assert "final answer to this problem is: 10\n" in shown
    assert "reference" not in shown and "2 + 3" not in shown and "Twice" not in shown and "####" not in shown


def test_a_partial_exposure_shows_the_first_segments_verbatim_and_the_answer(backend):
    text = builder_of(make_tokenizer(backend, read_template("thinking"))).teacher_text(PROBLEM, REFERENCE, 0.5)
    assert REFERENCE.segments[0] == "Add: 2 + 3 = 5. "
    assert "begin" in text and "\n\nAdd: 2 + 3 = 5.\n\nIts final answer is: 10\n" in text
    assert "Twice" not in text and "double" not in text and "####" not in text


def test_slot_names_inside_problems_and_solutions_stay_as_they_are(backend):
    builder = builder_of(make_tokenizer(backend, read_template("thinking")))
    assert PROBLEM.problem in builder.student_text(PROBLEM)
    assert all(PROBLEM.problem in builder.teacher_text(PROBLEM, REFERENCE, alpha) for alpha in ALPHAS)
    assert "double {problem}." in builder.teacher_text(PROBLEM, REFERENCE, 1.0)


def test_the_student_never_sees_solution_or_answer(backend):
    builder = builder_of(make_tokenizer(backend, read_template("thinking")))
    hidden = Problem("p", "What is twice five?", "SECRET WORKING", "SECRET ANSWER")
    assert "SECRET" not in builder.student_text(hidden)
    assert builder.student_text(hidden).startswith("What is twice five?")


def assert_response_starts_at_the_same_place(tokenizer, **kwargs):
    """The ids after the user's words are the same in both prompts, and appending a response changes none of them."""
    builder = builder_of(tokenizer, **kwargs)
    chat_kwargs = kwargs.get("student_chat_kwargs") or {}
    messages = [{"role": "user", "content": "x"}]
    closed = tokenizer.apply_chat_template(messages, tokenize=False, **chat_kwargs)
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **chat_kwargs)
    generation_prompt = tokenizer(opened[len(closed) :], add_special_tokens=False)["input_ids"]
    assert generation_prompt and builder.student_suffix == builder.teacher_suffix
    student = builder.student(PROBLEM)
    response = tokenizer("The final answer", add_special_tokens=False)["input_ids"]
    for alpha in ALPHAS:
        teacher = builder.teacher(PROBLEM, REFERENCE, alpha)
        assert student[-len(generation_prompt) :] == teacher[-len(generation_prompt) :] == generation_prompt
        whole = tokenizer.decode(teacher + response)
        assert whole.endswith(tokenizer.decode(generation_prompt) + "The final answer")
    for ids in (student, teacher):
        assert ids.count(tokenizer.bos_token_id) == opened.count(tokenizer.bos_token)  # never added a second time


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("chat_kwargs", [None, {"enable_thinking": False}, {"enable_thinking": True}])
def test_the_first_response_token_sits_at_the_same_place_in_both_prompts(backend, name, chat_kwargs):
    tokenizer = make_tokenizer(backend, read_template(name))
    assert_response_starts_at_the_same_place(
        tokenizer, student_chat_kwargs=chat_kwargs, teacher_chat_kwargs=chat_kwargs
    )


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_instruct_2507", "llama3", "llama3_1", "llama3_2", "gemma"])
def test_the_first_response_token_sits_at_the_same_place_under_the_templates_of_real_models(backend, name):
    path = trl_templates() / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this trl ships no {path.name}")
    assert_response_starts_at_the_same_place(make_tokenizer(backend, path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("thinking", [True, False])
def test_qwen3_puts_the_response_after_the_same_think_block_in_both(backend, thinking):
    tokenizer = make_tokenizer(backend, (trl_templates() / "qwen3.jinja").read_text(encoding="utf-8"))
    kwargs = {"enable_thinking": thinking}
    assert_response_starts_at_the_same_place(tokenizer, student_chat_kwargs=kwargs, teacher_chat_kwargs=kwargs)
    expected = "<|im_end|>\n<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")
    assert builder_of(tokenizer, student_chat_kwargs=kwargs, teacher_chat_kwargs=kwargs).student_suffix == expected


def test_qwen3_thinks_as_a_teacher_and_not_as_a_student_token_by_token(backend):
    """OPSD's setting: the student's prompt goes on with a closed think block, and the same response ids follow both."""
    tokenizer = make_tokenizer(backend, (trl_templates() / "qwen3.jinja").read_text(encoding="utf-8"))
    with pytest.warns(UserWarning, match="prompts end differently because their chat kwargs do"):
        builder = builder_of(
            tokenizer,
            student_chat_kwargs={"enable_thinking": False},
            teacher_chat_kwargs={"enable_thinking": True},
        )
    opened = tokenizer("<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    block = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
    student = builder.student(PROBLEM)
    assert student[-len(opened + block) :] == opened + block
    assert student == chat(tokenizer, builder.student_text(PROBLEM), enable_thinking=False)
    for alpha in ALPHAS:
        teacher = builder.teacher(PROBLEM, REFERENCE, alpha)
        assert teacher[-len(opened) :] == opened
        assert teacher == chat(tokenizer, builder.teacher_text(PROBLEM, REFERENCE, alpha), enable_thinking=True)


@pytest.mark.model
def test_smollm2_reads_the_prompts_token_by_token(smollm2_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert_response_starts_at_the_same_place(tokenizer)
    builder = builder_of(tokenizer, PromptTemplates(system="Be brief."))
    problem = Problem("p", "What is 2 + 2?", "", "4")
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?\n\nReason step by step, and put "
    )
    expected += "your final answer within \\boxed{}.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(builder.student(problem)) == expected


def test_a_difference_asked_for_by_the_kwargs_is_warned_about_and_kept(backend):
    tokenizer = make_tokenizer(backend, read_template("thinking"))
    with pytest.warns(UserWarning, match="prompts end differently because their chat kwargs do"):
        builder = builder_of(tokenizer, student_chat_kwargs={"enable_thinking": False})
    assert builder.student(PROBLEM) == chat(tokenizer, builder.student_text(PROBLEM), enable_thinking=False)
    teacher_text = builder.teacher_text(PROBLEM, REFERENCE, 0.5)
    assert builder.teacher(PROBLEM, REFERENCE, 0.5) == chat(tokenizer, teacher_text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        builder_of(tokenizer, student_chat_kwargs={"enable_thinking": True})  # renders alike: nothing to warn about


def test_a_system_prompt_reaches_both_sides(backend):
    tokenizer = make_tokenizer(backend, read_template("default_system"))
    builder = builder_of(tokenizer, PromptTemplates(system="Be careful."))
    assert builder.student(PROBLEM) == chat(tokenizer, builder.student_text(PROBLEM), system="Be careful.")
    teacher_text = builder.teacher_text(PROBLEM, REFERENCE, 1.0)
    assert builder.teacher(PROBLEM, REFERENCE, 1.0) == chat(tokenizer, teacher_text, system="Be careful.")


def test_a_template_that_refuses_system_prompts_is_named_before_training(backend):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    template += "{{ messages[0]['content'] + '\nmodel:' }}"
    with pytest.raises(ValueError, match="and a system prompt: no system role"):
        builder_of(make_tokenizer(backend, template), PromptTemplates(system="Be careful."))


def test_tokenizers_that_cannot_chat_are_refused(backend):
    with pytest.raises(ValueError, match="no chat template"):
        builder_of(make_tokenizer(backend, None))
    with pytest.raises(ValueError, match="no generation prompt"):
        builder_of(make_tokenizer(backend, "{% for message in messages %}{{ message['content'] }}{% endfor %}"))


def test_an_over_long_prompt_is_refused_by_its_problem_and_never_cut(backend):
    tokenizer = make_tokenizer(backend, read_template("thinking"))
    length = len(builder_of(tokenizer).student(PROBLEM))
    assert len(builder_of(tokenizer, max_prompt_length=length).student(PROBLEM)) == length
    with pytest.raises(PromptTooLong, match=rf"'p-1' has {length} tokens, {length - 1} fit: raise max_prompt_length"):
        builder_of(tokenizer, max_prompt_length=length - 1).student(PROBLEM)

    full = len(builder_of(tokenizer).teacher(PROBLEM, REFERENCE, 1.0))
    tight = builder_of(tokenizer, context_length=full + 99)
    with pytest.raises(PromptTooLong) as caught:
        tight.teacher(PROBLEM, REFERENCE, 1.0)
    assert (caught.value.problem_id, caught.value.length, caught.value.limit) == ("p-1", full, full - 1)
    assert len(tight.teacher(PROBLEM, REFERENCE, 0.0)) < full


def test_the_check_before_training_finds_what_any_exposure_would_refuse(backend):
    tokenizer = make_tokenizer(backend, read_template("thinking"))
    roomy = builder_of(tokenizer, max_completion_length=10)
    roomy.check(PROBLEM, REFERENCE, REFERENCE)
    needed = max(len(roomy.teacher(PROBLEM, REFERENCE, alpha)) for alpha in ALPHAS)
    reply = len(roomy.reference_completion(REFERENCE)[0])
    assert reply > 10
    builder_of(tokenizer, max_completion_length=10, context_length=needed + reply).check(PROBLEM, REFERENCE, REFERENCE)
    with pytest.raises(PromptTooLong, match="prompt and reference reply"):
        builder_of(tokenizer, max_completion_length=10, context_length=needed + reply - 1).check(
            PROBLEM, REFERENCE, REFERENCE
        )
    nothing_to_cut = split_reference("#### 10", None)
    roomy.check(PROBLEM, nothing_to_cut, nothing_to_cut)


def test_each_model_needs_room_for_its_own_prompt_only(backend):
    """A teacher of a longer context reads prompts that the student could not; one of a shorter is held to its own."""
    tokenizer = make_tokenizer(backend, read_template("thinking"))
    roomy = builder_of(tokenizer, max_completion_length=10)
    student, reply = len(roomy.student(PROBLEM)), len(roomy.reference_completion(REFERENCE)[0])
    teacher = max(len(roomy.teacher(PROBLEM, REFERENCE, alpha)) for alpha in ALPHAS)
    assert student < teacher

    def check(context_length, teacher_context_length):
        contexts = {"context_length": context_length, "teacher_context_length": teacher_context_length}
        builder_of(tokenizer, max_completion_length=10, **contexts).check(PROBLEM, REFERENCE, REFERENCE)

    check(student + reply, teacher + reply)
    with pytest.raises(PromptTooLong, match="use a teacher with a longer context"):
        check(2000, teacher + reply - 1)
    with pytest.raises(PromptTooLong, match="use a student with a longer context"):
        check(student + reply - 1, 2000)
    with pytest.raises(ValueError, match="no room for a prompt in the teacher's context of 10 tokens"):
        check(2000, 10)


def test_the_reference_reply_is_the_solution_closed_by_eos(backend):
    tokenizer = make_tokenizer(backend, read_template("thinking"))
    ids, ends = builder_of(tokenizer).reference_completion(REFERENCE)
    assert ids == [*tokenizer(REFERENCE.solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(ends) == len(REFERENCE.segments)


def test_segment_ends_count_the_tokens_that_show_a_segment(backend):
    tokenizer = make_tokenizer(backend, read_template("thinking"))
    builder = builder_of(tokenizer)
    solutions = [p.solution for p in load_problems("gsm_symbolic", num_train=40, num_probe=0, num_eval=0, seed=3).train]
    for solution in [*solutions, "One sentence. Then twice that is 10. é — ü. Fin. So $\\boxed{7}$."]:
        reference = split_reference(solution, None)
        ids, ends = builder.reference_completion(reference)
        assert ends == sorted(ends) and ends[-1] < len(ids) - 1  # tokens of the answer are always left
        for count, end in enumerate(ends, start=1):
            shown = "".join(reference.segments[:count])
            assert tokenizer.decode(ids[:end]).rstrip() == shown.rstrip()


def test_a_token_across_the_border_counts_as_shown():
    class Joined:
        """A tokenizer with one token over both segments' border."""

        chat_template, is_fast, eos_token_id, name_or_path = "x", True, 9, "joined"

        def apply_chat_template(self, messages, add_generation_prompt=True, **kwargs):
            return messages[-1]["content"] + ("|" if add_generation_prompt else "")

        def __call__(self, text, return_offsets_mapping=False, **kwargs):
            return {"input_ids": [1, 2, 3], "offset_mapping": [(0, 1), (1, 3), (3, len(text))]}

    ids, ends = builder_of(Joined()).reference_completion(Reference(("ab", "c"), "7", "d"))
    assert (ids, ends) == ([1, 2, 3, 9], [2, 2])


def test_a_solution_that_does_not_end_in_its_answer_is_given_one_to_score(backend):
    tokenizer = make_tokenizer(backend, read_template("thinking"))
    ids, ends = builder_of(tokenizer).reference_completion(split_reference("Add. Double.", "10"))
    assert tokenizer.decode(ids) == "Add. Double.\n\nFinal answer: \\boxed{10}<|im_end|>"
    assert tokenizer.decode(ids[ends[-1] :]).strip() == "Final answer: \\boxed{10}<|im_end|>"


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_templates_come_from_a_file(tmp_path, suffix):
    content = {"student": "Q: {problem} A in \\boxed{answer}:", "system": None, "transition": "Go."}
    path = tmp_path / f"templates{suffix}"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML too
    templates = PromptTemplates.from_file(path)
    assert (templates.student, templates.transition) == (content["student"], "Go.")
    assert templates.teacher == PromptTemplates().teacher


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"studnet": "{problem}"}', "studnet"),
        ('{"student": "no slot"}', r"'student' lacks \{problem\}"),
        ('{"student": "{problem} {reference}"}', r"must not contain \{reference\}"),
        ('{"teacher_answer_only": "{problem} {answer} {reference}"}', r"must not contain \{reference\}"),
        ('{"transition": "Read {reference}. Go on."}', r"'transition' must not contain \{reference\}"),
        ('{"system": "You are asked: {problem}"}', r"'system' must not contain \{problem\}"),
        ('{"teacher": 5}', "'teacher' in .* must be a string, got 5"),
        ('["student"]', "must map"),
        ('{"student": ', "cannot be read"),
    ],
)
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_bad_template_file_is_refused_with_what_is_wrong(tmp_path, content, message, suffix):
    path = tmp_path / f"templates{suffix}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        PromptTemplates.from_file(path)


def test_a_missing_template_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*nowhere\.yaml"):
        PromptTemplates.from_file(tmp_path / "nowhere.yaml")
