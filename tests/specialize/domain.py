"""A whole tiny domain in a folder: random model with a real tokenizer, seeds, corpus, tasks, and a quick recipe."""

import json
from pathlib import Path
from types import SimpleNamespace

from safetensors.torch import save_file
from specialize.engine.config import ModelConfig
from specialize.engine.weights import RandomTensors
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ANIMALS = ["cat", "dog", "owl", "fox", "hen", "bat", "cow", "ant"]
PLACES = ["barn", "wood", "yard", "cave", "field", "nest"]

RECIPE = """
name: tiny
examples: 10
dtype: fp32
retrieval: {mode: bm25, chunk_words: 40, overlap_words: 5}
instructions: {candidates: 1.5, max_waves: 2, group: 4, max_tokens: 8, novel: 0.2}
responses: {samples: 2, max_tokens: 4, passages: 1}
filter: {min_agreement: 0.0, max_words: 200, min_words: 1}
tune: {rank: 8, alpha: 16, learning_rate: 2e-2, epochs: 1, teacher_epochs: 6, batch: 4, schedule: constant}
evaluate: {limit: 4, max_tokens: 4, general: false}
"""


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_model(folder: Path, text: str) -> None:
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    config = {
        "model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "eos_token_id": 0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = RandomTensors(ModelConfig.from_dict(config, source="test"), 0, std=0.2)
    save_file(dict(tensors.items()), folder / "model.safetensors", metadata={"format": "pt"})


def write_domain(folder: Path) -> SimpleNamespace:
    folder.mkdir(parents=True, exist_ok=True)
    seeds, documents, examples = [], [], []
    for i, animal in enumerate(ANIMALS):
        place = PLACES[i % len(PLACES)]
        text = f"The {animal} that we saw at noon was asleep in the {place} by the old road."
        seeds.append({"task": "sleep", "instruction": "Say whether the animal sleeps.", "input": text, "output": "yes"})
    seeds[-1]["output"] = seeds[-3]["output"] = "no"
    for i in range(40):
        animal, place = ANIMALS[i % 8], PLACES[(i // 3) % 6]
        text = f"On day {i} the {animal} went to the {place} and had a rest there for some hours. It ate {i} seeds."
        documents.append({"id": f"d{i}", "title": f"Log {i}", "text": text})
    for i in range(6):
        examples.append(
            {"input": f"Evening {i}: the {ANIMALS[i]} sat awake on the {PLACES[i]} roof.", "outputs": ["no"]}
        )
    (folder / "seeds.jsonl").write_text(lines(seeds))
    (folder / "corpus.jsonl").write_text(lines(documents))
    (folder / "tasks").mkdir()
    shots = [{"input": s["input"], "output": s["output"]} for s in seeds[:2]]
    task = {
        "name": "awake",
        "instruction": "Say whether the animal sleeps.",
        "metric": "f1",
        "shots": shots,
        "examples": examples,
    }
    (folder / "tasks" / "awake.json").write_text(json.dumps(task))
    (folder / "recipe.yaml").write_text(RECIPE)
    text = " ".join(s["input"] + s["output"] for s in seeds) + " ".join(d["text"] for d in documents)
    write_model(folder / "model", text + " ### Instruction:\n\n### Input:\n\n### Response:\nyes no yes no yes no")
    return SimpleNamespace(
        folder=folder,
        inputs={path.split(".")[0]: str(folder / path) for path in ("model", "seeds.jsonl", "corpus.jsonl", "tasks")},
        recipe=folder / "recipe.yaml",
    )  # fmt: skip
