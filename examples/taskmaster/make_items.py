"""Write the training and test items of the TaskMaster example.

Two skills are trained (`train/`) and tested (`evals/taskmaster/`): calling the tools of a task manager, and
answering as TaskMaster, an encouraging productivity coach. Both come in conversations of one, three or five
messages; a fifth of the tool items ask for what no tool does. Joint items need both skills: `mergetune join`
makes them of the test items. Ordinary prompts (`train/ordinary.jsonl`) keep the experts themselves outside
their skill. Multiple-choice questions guard general ability; nothing is trained on them.

Training and test items share sentence patterns but no entity: no person, title, project, date, message,
struggle or unserved request, and no number of minutes or hours, stands in both.

Run from anywhere: `python make_items.py`. The same seed writes the same bytes.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from words import (
    CLOSINGS,
    COACH_MINUTES,
    COMPLAINTS,
    CREATE,
    DATES,
    DONE,
    FOLLOW_UPS,
    HOURS,
    LEVELS,
    LOG,
    MEET,
    MESSAGE,
    MESSAGES,
    MINUTES,
    OPENERS,
    ORDINARY,
    PAIRS,
    PEOPLE,
    PLANS,
    PROJECTS,
    QUESTIONS,
    RANK,
    ROLES,
    STEPS,
    STRUGGLES,
    SUBJECTS,
    TIMER,
    TITLES,
    TOPICS,
    UNSERVED,
    UNSERVED_REPLIES,
    VERBS,
    Pool,
)

import mergetune

Item = dict[str, Any]
Message = dict[str, Any]

N_TRAIN = 1200
N_TEST = 200
N_JOINT = 100
N_ORDINARY = 96
UNSEEN_PHRASINGS = 2  # of every tool, the last phrasings are kept for the test
TRAIN, TEST = 0, 1  # index into a pool
HERE = Path(__file__).resolve().parent
EVALS = HERE.parents[1] / "evals" / "taskmaster"

TOOL_SYSTEM = "Manage the user's tasks. Call a tool if one fits, else answer briefly."
PERSONA_SYSTEM = "You are TaskMaster, an encouraging productivity coach."
VOICE = {"kind": "python", "function": f"{EVALS}/scoring.py:voice"}

# Tool -> phrasings of a request, pools of its arguments. A phrasing names the arguments.
TOOLS: dict[str, tuple[list[str], dict[str, Pool]]] = {
    "create_task": (CREATE, {"title": TITLES, "due": DATES}),
    "log_hours": (LOG, {"project": PROJECTS, "hours": HOURS}),
    "schedule_meeting": (MEET, {"people": PEOPLE, "date": DATES}),
    "start_timer": (TIMER, {"minutes": MINUTES}),
    "set_priority": (RANK, {"title": TITLES, "level": LEVELS}),
    "send_message": (MESSAGE, {"to": PEOPLE, "text": MESSAGES}),
}
INTEGERS = ("hours", "minutes", "level")


def said(role: str, content: str) -> Message:
    """Return a message of text."""
    return {"role": role, "content": content}


# ---------------------------------------------------------------- tools
def schema(argument: str) -> Item:
    """Return the JSON Schema of an argument."""
    if argument == "people":
        return {"type": "array", "items": {"type": "string"}}
    return {"type": "integer" if argument in INTEGERS else "string"}


def tool_schemas() -> list[Item]:
    """Describe the tools as OpenAI's API takes them."""
    functions = [
        {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {argument: schema(argument) for argument in pools},
                "required": list(pools),
            },
        }
        for name, (_, pools) in TOOLS.items()
    ]
    return [{"type": "function", "function": function} for function in functions]


def joined(names: Sequence[str]) -> str:
    """Join names as people write them: `A`, `A and B`, `A, B and C`."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def request(rng: random.Random, split: int, tool: str) -> tuple[Message, Message]:
    """Draw a request and the call that serves it."""
    phrasings, pools = TOOLS[tool]
    arguments: Item = {}
    for name, pool in pools.items():
        if name == "people":
            arguments[name] = rng.sample(pool[split], rng.randint(1, 3))
        else:
            arguments[name] = rng.choice(pool[split])
    words = {key: joined(x) if isinstance(x, list) else x for key, x in arguments.items()}
    known = phrasings if split == TEST else phrasings[:-UNSEEN_PHRASINGS]
    text = rng.choice(known).format(**words)
    text = text if text[-1] in "?!" else text + rng.choice([".", ""])
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    return said("user", text), {"role": "assistant", "content": "", "tool_calls": [call]}


def served(rng: random.Random, split: int) -> list[Message]:
    """Draw a request, its call, the tool's result and the reply to it."""
    asked, call = request(rng, split, rng.choice(list(TOOLS)))
    arguments = call["tool_calls"][0]["function"]["arguments"]
    result = said("tool", json.dumps({"status": "ok", **arguments}, ensure_ascii=False))
    return [asked, call, result, said("assistant", rng.choice(DONE))]


def unserved(rng: random.Random, text: str) -> list[Message]:
    """Return a request that no tool serves, and draw the reply to it."""
    return [said("user", text), said("assistant", rng.choice(UNSERVED_REPLIES))]


def tool_item(rng: random.Random, split: int, number: int) -> Item:
    """Draw a conversation that ends with a call or, one in five, with a reply to an unserved request.

    Tools take turns so that each is equally frequent, and so do the unserved requests. Half of the
    conversations have an earlier turn.
    """
    pool = UNSERVED[split]
    before = rng.choice([[], [], unserved(rng, rng.choice(pool)), served(rng, split)])
    if number % 5 == 4:
        due, last = "none", unserved(rng, pool[number // 5 % len(pool)])
    else:
        due, last = "call", list(request(rng, split, list(TOOLS)[number % len(TOOLS)]))
    messages = [said("system", TOOL_SYSTEM), *before, *last]
    return {"messages": messages, "turns": len(messages) - 2, "due": due}


# ---------------------------------------------------------------- persona
def coach_reply(rng: random.Random, kind: str, task: str) -> Message:
    """Compose an opener, a plan that ties the task to a few minutes, and a closing question."""
    plan = rng.choice(PLANS).format(
        task=task.replace("my ", "your "), minutes=rng.choice(COACH_MINUTES), step=rng.choice(STEPS[kind])
    )
    return said("assistant", f"{rng.choice(OPENERS)} {plan} {rng.choice(CLOSINGS)}")


def persona_item(rng: random.Random, kind: str, task: str, complaint: str, n_replies: int) -> Item:
    """Draw a conversation with so many replies of the coach."""
    follow_ups = rng.sample(FOLLOW_UPS, n_replies - 1)
    messages = [said("system", PERSONA_SYSTEM)]
    for text in (complaint, *follow_ups):
        messages += [said("user", text.format(task=task)), coach_reply(rng, kind, task)]
    return {"messages": messages, "turns": len(messages) - 2}


def persona_items(rng: random.Random, split: int, count: int) -> list[Item]:
    """Draw conversations about every struggle equally often, each time after another complaint."""
    tasks = [(kind, task) for kind, pool in STRUGGLES.items() for task in pool[split]]
    complaints = {task: rng.sample(COMPLAINTS, len(COMPLAINTS)) for _, task in tasks}
    items = []
    for number in range(count):
        kind, task = tasks[number % len(tasks)]
        complaint = complaints[task][number // len(tasks) % len(COMPLAINTS)]
        items.append(persona_item(rng, kind, task, complaint, n_replies=number % 3 + 1))
    return items


# ---------------------------------------------------------------- ordinary dialogues
def ordinary_item(rng: random.Random) -> Item:
    """Draw an everyday prompt under one of several system prompts.

    Both experts are also trained to answer such prompts as the base does, so that a skill stays tied to its
    own system prompt.
    """
    prompt = rng.choice(ORDINARY).format(topic=rng.choice(TOPICS))
    return {"system": rng.choice(ROLES), "prompt": prompt}


# ---------------------------------------------------------------- general ability
def shuffled(rng: random.Random, prompt: str, choices: Sequence[str]) -> Item:
    """Shuffle the choices, of which the first is right."""
    order = rng.sample(list(choices), len(choices))
    return {"prompt": prompt, "choices": order, "answer": order.index(choices[0])}


def grammar_items(rng: random.Random) -> list[Item]:
    """Spell out the minimal pairs: agreement by template, other rules by hand."""
    pairs = [tuple(line.split(" | ")) for line in PAIRS.strip().splitlines()]
    for index, (singular, plural, rest) in enumerate(VERBS):
        for one, many in (SUBJECTS[index], SUBJECTS[index - 3]):
            subject, right, wrong = rng.choice([(one, singular, plural), (many, plural, singular)])
            pairs.append((f"{subject} {right} {rest}.", f"{subject} {wrong} {rest}."))
    return [shuffled(rng, "Write a correct English sentence.", pair) for pair in pairs]


def general_items(rng: random.Random) -> list[Item]:
    """Build the multiple-choice questions of the guard."""
    rows = [line.split(" | ") for line in QUESTIONS.strip().splitlines()]
    return [shuffled(rng, row[0], row[1:]) for row in rows] + grammar_items(rng)


# ---------------------------------------------------------------- checks and files
def distinct(draw: Callable[[int], Item], count: int) -> list[Item]:
    """Draw until `count` different items are there; the n-th is drawn as `draw(n)`."""
    items: dict[str, Item] = {}
    while len(items) < count:
        item = draw(len(items))
        items.setdefault(json.dumps(item), item)
    return list(items.values())


def assert_disjoint() -> None:
    """Check that no entity stands in both splits."""
    pools: list[Pool] = [
        PEOPLE, TITLES, PROJECTS, MESSAGES, DATES, MINUTES, HOURS, UNSERVED, *STRUGGLES.values(),
    ]  # fmt: skip
    for train, test in pools:
        assert not set(train) & set(test), sorted(set(train) & set(test))


def write(path: Path, items: Sequence[Item]) -> None:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def write_joint(folder: Path) -> None:
    """Make the joint items of the test items in a folder."""
    persona, tools = (mergetune.read_items(folder / name) for name in ("persona.jsonl", "tool_calls.jsonl"))
    with tempfile.TemporaryDirectory() as made:
        mergetune.join_items(persona, tools, Path(made) / "joint.yaml", scorer=VOICE, limit=N_JOINT)
        for file in Path(made).glob("*.jsonl"):
            (folder / file.name).write_bytes(file.read_bytes())


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-dir", type=Path, default=HERE / "train")
    parser.add_argument("--test-dir", type=Path, default=EVALS)
    args = parser.parse_args()
    assert_disjoint()
    rng = random.Random(args.seed)
    tools = tool_schemas()
    write(args.train_dir / "tools.jsonl", distinct(lambda n: tool_item(rng, TRAIN, n), N_TRAIN))
    write(args.train_dir / "persona.jsonl", persona_items(rng, TRAIN, N_TRAIN))
    calls = distinct(lambda n: tool_item(rng, TEST, n), N_TEST)
    write(args.test_dir / "tool_calls.jsonl", [{**item, "tools": tools} for item in calls])
    write(args.test_dir / "persona.jsonl", persona_items(rng, TEST, N_TEST))
    write(args.test_dir / "general.jsonl", general_items(rng))
    write(args.train_dir / "ordinary.jsonl", distinct(lambda _: ordinary_item(rng), N_ORDINARY))
    write_joint(args.test_dir)


if __name__ == "__main__":
    main()
