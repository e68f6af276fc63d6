#!/usr/bin/env python3
"""Drives a running cluster with the `openai` package, unchanged, and checks what comes back.

    pip install openai
    python bench/clients/openai_check.py http://127.0.0.1:8000 trireme-tiny
"""
import sys

import openai

base, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
question = [{"role": "user", "content": "What is a planet?"}]
answer = "A planet is a big round body that travels around a star. We live on the planet Earth."
passed = 0


def check(what, holds, seen=None):
    global passed
    if not holds:
        sys.exit(f"FAILED {what}: {seen!r}")
    passed += 1
    print(f"ok {what}")


def refused(what, kind, names, call):
    try:
        call()
    except kind as error:
        check(what, names in str(error), str(error))
    else:
        sys.exit(f"FAILED {what}: accepted")


check("models.list", model in [m.id for m in client.models.list()])
check("models.retrieve", client.models.retrieve(model).id == model)

one = client.chat.completions.create(model=model, messages=question, temperature=0)
check("chat", one.choices[0].message.content == answer, one)
check("finish reason", one.choices[0].finish_reason == "stop", one)
check("usage", one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens and one.usage.completion_tokens > 10, one.usage)

chunks = list(client.chat.completions.create(model=model, messages=question, temperature=0, stream=True, stream_options={"include_usage": True}))
check("streamed text", "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == answer, chunks)
check("streamed in pieces", len(chunks) > 10, len(chunks))
check("streamed usage last", chunks[-1].usage.completion_tokens == one.usage.completion_tokens and not chunks[-1].choices, chunks[-1])
check("streamed role first", chunks[0].choices[0].delta.role == "assistant", chunks[0])

stopped = client.chat.completions.create(model=model, messages=question, temperature=0, stop=["around a"])
check("stop string", stopped.choices[0].message.content == "A planet is a big round body that travels " and stopped.choices[0].finish_reason == "stop", stopped)
short = client.chat.completions.create(model=model, messages=question, temperature=0, max_completion_tokens=3)
check("length", short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 3, short)

tell = dict(model=model, messages=[{"role": "user", "content": "Tell me a story about a fox."}], temperature=0.9, max_tokens=24)
three = client.chat.completions.create(n=3, seed=5, **tell)
check("n", sorted(c.index for c in three.choices) == [0, 1, 2] and len({c.message.content for c in three.choices}) > 1, three)
again = client.chat.completions.create(n=3, seed=5, **tell)
check("seed", [c.message.content for c in three.choices] == [c.message.content for c in again.choices], again)
streams = {}
for chunk in client.chat.completions.create(n=3, seed=5, stream=True, **tell):
    for c in chunk.choices:
        streams[c.index] = streams.get(c.index, "") + (c.delta.content or "")
check("n streamed", [streams[i] for i in range(3)] == [c.message.content for c in three.choices], streams)

probable = client.chat.completions.create(model=model, messages=question, temperature=0, logprobs=True, top_logprobs=4, max_tokens=5)
content = probable.choices[0].logprobs.content
check("logprobs", len(content) == 5 and all(t.logprob <= 0 and len(t.top_logprobs) == 4 for t in content), content)
check("logprobs: greedy is the best", all(t.token == t.top_logprobs[0].token for t in content), content)
check("logprobs: bytes", bytes(b for t in content for b in t.bytes).decode() == probable.choices[0].message.content, content)

text = client.completions.create(model=model, prompt="Once upon a time", temperature=0, max_tokens=8, logprobs=2)
check("completions", len(text.choices[0].text) > 0 and len(text.choices[0].logprobs.tokens) == 8, text)
pieces = [c.choices[0].text for c in client.completions.create(model=model, prompt="Once upon a time", temperature=0, max_tokens=8, stream=True) if c.choices]
check("completions streamed", "".join(pieces) == text.choices[0].text, pieces)
ids = client.completions.create(model=model, prompt=[0, 5, 6, 7], temperature=0, max_tokens=4, extra_body={"return_token_ids": True, "ignore_eos": True})
check("token ids", ids.usage.prompt_tokens == 4 and len(ids.choices[0].token_ids) == 4, ids)
several = client.completions.create(model=model, prompt=["Once upon a time", "The fox"], temperature=0, max_tokens=4)
check("several prompts", [c.index for c in several.choices] == [0, 1], several)
thought = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is 2+3?"}], temperature=0,
    extra_body={"chat_template_kwargs": {"thinking": True}})
check("reasoning apart", bool(thought.choices[0].message.reasoning_content) and "</think>" not in (thought.choices[0].message.content or ""), thought)

refused("unknown model", openai.NotFoundError, "gpt-4", lambda: client.chat.completions.create(model="gpt-4", messages=question))
refused("bad temperature", openai.BadRequestError, "temperature", lambda: client.chat.completions.create(model=model, messages=question, temperature=7))
refused("unknown field", openai.BadRequestError, "colour", lambda: client.chat.completions.create(model=model, messages=question, extra_body={"colour": 1}))
refused("context", openai.BadRequestError, "context", lambda: client.completions.create(model=model, prompt=[5] * 5000))
refused("tools", openai.BadRequestError, "tools", lambda: client.chat.completions.create(model=model, messages=question, tools=[{"type": "function", "function": {"name": "f"}}]))
print(f"{passed} passed, 0 failed")
