"""Plans and judgement of candidates, without a model."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specialize import filter as rules
from specialize.kinds import kinds_of
from specialize.ledger import Item, Reply
from specialize.prompts import response_prompt
from specialize.recipe import Recipe, override
from specialize.records import Seed, Verdict
from specialize.synthesize import Synthesizer, cut, number_of, sentences

TEXT = "Dr. Smith et al. found gout in 5 of 9 men, e.g. old ones. It was mild. Was it flu? Fig. 2 shows p < 0.05."


def documents(count):
    return [
        SimpleNamespace(
            id=f"d{i}",
            title="",
            text=f"Patient {i} had gout and some fever for {i} days. He then had flu once more in year {i}.",
        )
        for i in range(count)
    ]


SEEDS = [
    Seed("s0", "ner", "List diseases.", "A man had gout for nine days last year.", "gout <Disease>"),
    Seed("s1", "ner", "List diseases.", "There was fever and flu in this case.", "fever <Disease>, flu <Disease>"),
    Seed(
        "s2",
        "qa",
        "Is it so?",
        "Abstract: Many men had gout in that year and some had flu.\nQuestion: Was it gout?",
        "yes",
    ),
    Seed(
        "s3",
        "qa",
        "Is it so?",
        "Abstract: No man had gout in that year but some had flu.\nQuestion: Was it gout?",
        "no",
    ),
    Seed("s4", "qa", "Is it so?", "Abstract: In this year we saw gout in a few of them.\nQuestion: Is it rare?", "yes"),
]


def maker(*settings, count=30):
    recipe = override(Recipe(), ["retrieval.mode='off'", "examples=10", *settings])
    return Synthesizer(recipe, kinds_of(SEEDS), documents(count))


def test_kinds_share_rows_or_words():
    assert maker().targets() == {"novel": 0, "k00": 5, "k01": 5}
    by_words = maker("instructions.shares=words").targets()
    words = [
        sum(len(f"{s.instruction} {s.input} {s.output}".split()) for s in k) / len(k) for k in (SEEDS[:2], SEEDS[2:])
    ]
    assert by_words["k00"] + by_words["k01"] == 10
    assert abs(by_words["k00"] * words[0] - by_words["k01"] * words[1]) <= max(words)
    assert by_words["k00"] > by_words["k01"]


def test_sentences_and_cutting():
    assert sentences(TEXT) == [
        "Dr. Smith et al. found gout in 5 of 9 men, e.g. old ones.",
        "It was mild.",
        "Was it flu?",
        "Fig. 2 shows p < 0.05.",
    ]
    assert (
        cut(TEXT, 15) == "Dr. Smith et al. found gout in 5 of 9 men, e.g. old ones. It was mild."[: len(cut(TEXT, 15))]
    )
    assert cut("one two three four", 2) == "one two"


@given(st.text(alphabet="aB .!?9", max_size=80))
def test_sentences_lose_no_word(text):
    assert " ".join(sentences(text)).split() == text.split()


def test_materials_are_distinct_in_range_and_repeatable():
    kind = maker().kinds[0]
    found = maker().materials(kind)
    assert found == maker().materials(kind)
    assert len({m.text for m in found}) == len(found) == 60
    assert all(kind.min_words <= len(m.text.split()) <= kind.max_words for m in found)


def test_targets_sum_to_the_examples_wanted():
    for settings in (("examples=7",), ("examples=300", "instructions.novel=0.13"), ("instructions.novel=1.0",)):
        one = maker(*settings)
        assert sum(one.targets().values()) == one.recipe.examples


def test_direct_and_written_inputs():
    one = maker()
    items, jobs = one.draft_jobs(0, "k00", range(5))
    assert [i.id for i in items] == [f"r1-k00-{n:06d}" for n in range(5)]
    assert not jobs
    items, jobs = one.draft_jobs(0, "k01", range(5))
    assert not items
    assert len({j.prompt[: j.prompt.rindex("### Input:")] for j in jobs}) == 1  # a group shares its demonstrations
    assert one.draft_jobs(0, "k01", range(5))[1] == jobs
    raws = [" Was it flu?", " no question", "", " Was it flu?" * 9, " Is it mild?"]
    ends = ["stop", "stop", "stop", "length", "stop"]
    replies = [
        Reply(j.reply_id(0), j.item_id, "input", 0, raw, end, 3, j.provenance)
        for j, raw, end in zip(jobs, raws, ends, strict=True)
    ]
    drafted = one.drafted(0, "k01", replies, rules.NearDuplicates(0.7))
    assert [d.reason for d in drafted] == ["", rules.UNPARSABLE, rules.UNPARSABLE, rules.CUT_OFF, ""]
    assert drafted[0].input == f"Abstract: {jobs[0].provenance['material']}\nQuestion: Was it flu?"


def test_novel_instructions_are_deduplicated_in_order():
    one = maker("instructions.novel=0.5", "filter.min_words=3")
    _, jobs = one.draft_jobs(0, "novel", range(4))
    raws = [" Count the days of fever.", " Count the days of the fever.", " x", " Name all men of that year."]
    replies = [
        Reply(j.reply_id(0), j.item_id, "instruction", 0, raw, "stop", 3, j.provenance)
        for j, raw in zip(jobs, raws, strict=True)
    ]
    drafted = one.drafted(0, "novel", replies, rules.NearDuplicates(0.7))
    assert [d.reason for d in drafted] == ["", rules.NEAR_DUPLICATE, rules.TOO_SHORT, ""]


def item(number, source="k00", kind="ner", text="Patient 3 had gout and fever and flu."):
    return Item(
        f"r1-{source}-{number:06d}", 1, 0, "corpus", kind, "List diseases.", text, provenance={"number": number}
    )


def replies(*raws, finish="stop"):
    return [Reply(f"r/{i}", "r", "response", i, raw, finish, 3) for i, raw in enumerate(raws)]


def test_votes_and_verdicts():
    one = maker("filter.min_agreement=0.4")
    samples = ("gout <Disease>, plague <Disease>", "gout <Disease>", "gout <Disease>, flu <Disease>", "gout <Disease>")
    verdict, answer, score = one.judge(item(0), replies(*samples))
    assert (verdict.kept, answer) == (True, "gout <Disease>")  # the plague is nowhere in the input
    assert 0.5 < score < 1
    assert one.judge(item(0), replies("gout <Disease>", "flu <Disease>"))[0].reason == rules.LOW_AGREEMENT
    assert (
        one.judge(item(0), replies("plague <Disease>", "gout <Cell>", "gout <Disease>"))[0].reason
        == "span not in the input"
    )
    assert one.judge(item(0), replies("", "", "gout <Disease>"))[0].reason == rules.EMPTY
    assert one.judge(item(0), replies("gout <Disease>", finish="length"))[0].reason == rules.CUT_OFF
    assert one.judge(item(0), [])[0].reason == rules.TOO_LONG_PROMPT
    # Labels: two thirds of the seeds say yes, so draws from them are equal in 5 of 9 cases.
    asked = item(0, "k01", "qa", SEEDS[2].input)
    assert maker("filter.min_agreement=0.1").kinds[1].form == "label"
    for yes, kept in ((9, True), (7, True), (6, False), (5, False)):  # of 36 pairs equal: 36, 22, 18, 16
        verdict, answer, _ = maker("filter.min_agreement=0.1").judge(
            asked, replies(*["yes"] * yes, *["no"] * (9 - yes))
        )
        assert (verdict.kept, answer) == (kept, "yes")
        assert maker("filter.min_agreement=0").judge(asked, replies(*["yes"] * yes, *["no"] * (9 - yes)))[0].kept
    # With demonstrations a prompt may be too long for the context where it is not without them.
    sound, failed = replies("gout <Disease>", "gout <Disease>"), replies("", "", "", finish="error")
    assert one.judge(item(0), sound + failed[:2])[0].kept
    assert one.judge(item(0), sound + failed)[0].reason == rules.TOO_LONG_PROMPT
    assert one.judge(item(0), failed[:1] + sound)[0].reason == rules.TOO_LONG_PROMPT
    qa = item(0, "k01", "qa")
    assert one.judge(qa, replies("yes", "yes", "no"))[1] == "yes"
    assert one.judge(qa, replies("perhaps", "perhaps", "no"))[0].reason == "label not among those of the seeds"


def test_from_the_second_round_on_answers_are_asked_after_demonstrations_too():
    one = maker("responses.samples=6", "responses.shots=1")
    items = [item(n) for n in range(40)] + [item(n, "k01", "qa") for n in range(2)]
    assert one.answers_each(1) == 7 and len(one.response_jobs(items, None, 1)) == 2 * len(items)
    assert maker("responses.samples=3").answers_each(2) == 4
    jobs = one.response_jobs(items, None, 2)
    ids = [job.reply_id(n) for job in jobs for n in range(job.params.n)]
    assert len(set(ids)) == len(ids) == one.answers_each(2) * len(items) == 13 * len(items)
    shown = [job for job in jobs if job.first_sample > 6]
    by_seed = {seed.id: seed for seed in one.seeds}
    sets = {}
    for job in shown:
        asked = next(i for i in items if i.id == job.item_id)
        seeds = [by_seed[name] for name in job.provenance["seeds"]]
        assert set(job.provenance) == {"seeds", "passages"}
        assert len(seeds) == len(set(job.provenance["seeds"])) == 1 and {s.kind for s in seeds} == {asked.kind}
        shots = [(s.instruction, s.input, s.output) for s in seeds]
        assert job.prompt == response_prompt(asked.instruction, asked.input, shots) and job.params.temperature == 0
        sets.setdefault((asked.kind, job.first_sample), set()).add(tuple(job.provenance["seeds"]))
    assert all(len(found) == 1 for found in sets.values()), "prompts of a kind share their demonstrations"
    assert len({found.pop() for (kind, _), found in sets.items() if kind == "ner"}) > 1, "no two answers the same ones"


def test_selection_is_balanced_and_complete():
    one = maker()
    judged = [
        (item(n), Verdict(True), "gout <Disease>" if n % 2 else "gout <Disease>, flu <Disease>", n / 40)
        for n in range(40)
    ]
    judged += [(item(n, "k01", "qa"), Verdict(True), "yes" if n else "no", 1.0) for n in range(3)]
    judged += [(item(99), Verdict(False, rules.EMPTY), "", 0.0)]
    chosen = one.select(judged)
    kept = [row for row in chosen if row[1].kept]
    assert len(chosen) == len(judged)
    assert len(kept) == 10
    assert sum(row[0].kind == "qa" for row in kept) == 3  # all there are; the other kind fills up
    ner = [row for row in kept if row[0].kind == "ner"]
    assert {2, 3} >= {sum("," in row[2] for row in ner) - 1} or abs(sum("," in row[2] for row in ner) - 3.5) <= 1
    assert {row[1].reason for row in chosen if not row[1].kept} == {rules.SURPLUS, rules.EMPTY}


def test_numbers_are_fixed_by_their_parts():
    assert number_of(0, "a", 1) == number_of(0, "a", 1) != number_of(0, "a1")
    assert 0 <= number_of("x", bits=31) < 2**31


class StubIndex:
    """Finds every passage for every query, in order."""

    def __init__(self, passages):
        self.hits = [SimpleNamespace(passage=p, score=1.0, rank=i) for i, p in enumerate(passages)]

    def search(self, queries, k, mode):
        return [self.hits[:k] for _ in queries]


NAMING = [
    Seed(f"n{i}", "name", "Name it.", f"A heat of the body far above normal, case {i}.", "fever") for i in range(3)
]
PASSAGES = [
    SimpleNamespace(
        id="d1-0", document_id="d1", title="Fever", text="A heat of the body. Fever is also called pyrexia."
    ),
    SimpleNamespace(id="d2-0", document_id="d2", title="", text="Some other text about the body."),
]


def test_passages_are_for_answers_that_are_not_in_the_input():
    kinds = kinds_of([*SEEDS, *NAMING])
    recipe = override(Recipe(), ["retrieval.mode=bm25", "responses.passages=2"])
    one = Synthesizer(recipe, kinds, documents(3), index=StubIndex(PASSAGES))
    assert [kind.open_book for kind in kinds] == [False, True, True]
    asked = [("a", kinds[0], "", "gout here", []), ("b", kinds[2], "Name it.", "a heat", ["d1", "d2"])]
    found = one.passages(asked)
    assert set(found) == {"b"}
    assert [p.id for p in found["b"]] == ["d1-0"]  # its own document says something new, since it has a title
    rows = one.seed_rows_with_passages()
    assert len(rows) == 6
    assert "### Background:\nFever: A heat of the body." in rows[-1]["prompt"]
    assert rows[-1]["response"] == "fever"


def test_sentences_that_name_their_document_come_last():
    titled = [
        SimpleNamespace(
            id=f"d{i}",
            title="Fever",
            text=f"Fever is a heat of the body in case {i}. It is far above what is normal in {i}.",
        )
        for i in range(5)
    ]
    recipe = override(Recipe(), ["retrieval.mode='off'", "examples=4"])
    one = Synthesizer(recipe, kinds_of(NAMING), titled)
    found = [m.text for m in one.materials(one.kinds[0])]
    assert len(found) == 10
    assert not any("Fever" in text for text in found[:5])
    assert all("Fever" in text for text in found[5:])


def test_sentences_nearer_to_a_kinds_seeds_come_first():
    drugs = [
        Seed(
            f"x{i}", "drugs", "List drugs.", f"On that day they took some aspirin in case number {i}.", "aspirin <Drug>"
        )
        for i in range(3)
    ]
    illness = [
        Seed(f"y{i}", "ills", "List ills.", f"On that day they had some measles in case number {i}.", "measles <Ill>")
        for i in range(3)
    ]
    texts = [f"Here {'aspirin' if i % 2 else 'measles'} was seen in the old patient number {i}." for i in range(40)]
    corpus = [SimpleNamespace(id=f"d{i}", title="", text=text) for i, text in enumerate(texts)]

    def embed(batch):
        rows = np.array([["aspirin" in t, "measles" in t] for t in batch], dtype=np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)

    kept = {}

    def remember(key, make):
        return kept.setdefault(key, make())

    recipe = override(Recipe(), ["retrieval.mode='off'", "examples=10", "instructions.candidates=2"])
    one = Synthesizer(recipe, kinds_of([*drugs, *illness]), corpus, embed=embed, remember=remember)
    found = [m.text for m in one.materials(one.kinds[0])]
    assert all("aspirin" in text for text in found[:20])
    assert len(found) == 40
    assert list(kept) == ["materials-0"]
