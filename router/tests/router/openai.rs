//! OpenAI's endpoints as a client sees them, over real HTTP, with scripted workers behind the router.

use crate::support::{Cluster, End, MODEL, Script, TINY_EOS, chat, tokens};
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn completion(prompt: Value) -> Value {
    json!({ "model": MODEL, "prompt": prompt, "max_tokens": 64 })
}

fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().expect("object") {
        body[name] = value.clone();
    }
    body
}

/// The text of choice `index` over all chunks, from `pointer` in each choice.
fn joined(chunks: &[Value], index: u64, pointer: &str) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().expect("choices"));
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice.pointer(pointer).and_then(Value::as_str))
        .collect()
}

#[tokio::test]
async fn a_chat_answers() {
    let (cluster, prefill, decode) = Cluster::with_pair(Script::text("The sky is blue.")).await;
    let answer = cluster.complete(CHAT, &chat("What colour is the sky?")).await;

    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], MODEL);
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({ "role": "assistant", "content": "The sky is blue." }));
    assert_eq!(choice["finish_reason"], "stop");
    let completion = tokens("The sky is blue.").len() + 1;
    let sequence = prefill.requests(1).await.remove(0);
    assert_eq!(answer["usage"]["prompt_tokens"], sequence.prompt.len());
    assert_eq!(answer["usage"]["completion_tokens"], completion);
    assert_eq!(answer["usage"]["total_tokens"], sequence.prompt.len() + completion);
    assert_eq!(answer["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
    let details = &answer["usage"]["completion_tokens_details"];
    let messages = completion - 1;
    assert_eq!(
        *details,
        json!({ "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 2 * messages })
    );
    assert!(answer.get("trireme_timings").is_none(), "only on demand");

    // Both workers got the same sequence, with every default filled in.
    let reserved = decode.requests(1).await.remove(0);
    assert_eq!(reserved.prompt, sequence.prompt);
    assert_eq!(reserved.sampling, sequence.sampling);
    let sampling = sequence.sampling.expect("resolved");
    assert_eq!((sampling.temperature, sampling.top_p), (Some(0.6), Some(0.95)), "generation_config.json");
    assert!(sampling.seed.is_some());
    let stopping = sequence.stopping.expect("resolved");
    assert_eq!(stopping.max_tokens, Some(4096 - sequence.prompt.len() as u32), "what the context leaves");
}

#[tokio::test]
async fn a_chat_streams_the_same_text() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("Ünïcödé, 漢字 and 🙂 stream.")).await;
    let body =
        with(chat("?"), json!({ "stream_options": { "include_usage": true }, "trireme_timings": true }));
    let chunks = cluster.stream(CHAT, &body).await;

    assert_eq!(joined(&chunks, 0, "/delta/content"), "Ünïcödé, 漢字 and 🙂 stream.");
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let (last, running) = chunks.split_last().expect("chunks");
    assert!(
        running.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["usage"].is_null())
    );
    assert!(running.iter().all(|chunk| chunk.get("usage").is_some()), "null until the last chunk");
    assert_eq!(running.last().expect("chunk")["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"], json!([]));
    assert!(last["usage"]["completion_tokens"].as_u64().expect("usage") > 5);
    let timings = &last["trireme_timings"];
    assert_eq!((&timings["prefill_queue_us"], &timings["prefill_us"]), (&json!(1), &json!(2)));
    assert_eq!((&timings["decode_first_us"], &timings["decode_us"]), (&json!(5), &json!(6)));
    for measured in ["admission_us", "reserve_us", "ttft_us", "total_us", "handoff_us"] {
        assert!(timings[measured].as_u64().expect(measured) > 0, "{measured}: {timings}");
    }
}

#[tokio::test]
async fn streams_without_usage_have_none() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("x y")).await;
    let chunks = cluster.stream(CHAT, &chat("?")).await;
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none() && chunk["choices"][0].is_object()));
}

#[tokio::test]
async fn completions_take_text_tokens_and_lists() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text(" world")).await;
    let text = cluster.complete(COMPLETIONS, &completion(json!("hello"))).await;
    assert_eq!(text["object"], "text_completion");
    assert_eq!(text["choices"][0]["text"], " world");
    let mut expected = vec![0];
    expected.extend(tokens("hello"));
    assert_eq!(prefill.requests(1).await[0].prompt, expected, "begin-of-sequence is added to text");

    cluster.complete(COMPLETIONS, &completion(json!([5, 6, 7]))).await;
    assert_eq!(prefill.requests(2).await[1].prompt, [5, 6, 7], "token ids are taken as they are");

    let body = with(completion(json!([[5, 6], [7]])), json!({ "n": 2 }));
    let lists = cluster.complete(COMPLETIONS, &body).await;
    let indices: Vec<_> =
        lists["choices"].as_array().expect("choices").iter().map(|c| c["index"].clone()).collect();
    assert_eq!(indices, [0, 1, 2, 3]);
    assert_eq!(lists["usage"]["prompt_tokens"], 3, "each prompt counts once");
    let mut prompts: Vec<_> = prefill.requests(6).await[2..]
        .iter()
        .map(|request| (request.prompt.clone(), request.choice))
        .collect();
    prompts.sort();
    assert_eq!(prompts, [(vec![5, 6], 0), (vec![5, 6], 1), (vec![7], 0), (vec![7], 1)]);

    cluster.complete(COMPLETIONS, &completion(json!(["one", "two"]))).await;
    assert_eq!(prefill.requests(8).await.len(), 8);
}

#[tokio::test]
async fn stop_strings_match_across_tokens_and_never_leak() {
    let script = Script { tokens_per_message: 2, ..Script::text("one two three END four") };
    let (cluster, prefill, _decode) = Cluster::with_pair(script).await;
    // Cuts inside of words: the stop string is spread over several tokens of a byte-pair vocabulary.
    for (stop, text) in [
        (json!("hree EN"), "one two t"),
        (json!(["zzz", " two"]), "one"),
        (json!("o t"), "one tw"),
        (json!(["absent"]), "one two three END four"),
    ] {
        let body = with(completion(json!("go")), json!({ "stop": stop }));
        let whole = cluster.complete(COMPLETIONS, &body).await;
        assert_eq!(whole["choices"][0]["text"], text, "{stop}");
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        let chunks = cluster.stream(COMPLETIONS, &body).await;
        assert_eq!(joined(&chunks, 0, "/text"), text, "{stop}");
        let matched = &whole["choices"][0]["stop_reason"];
        assert_eq!(matched.is_null(), text.ends_with("four"), "{matched}");
    }
    let sent = prefill.requests(8).await;
    assert!(
        sent.iter().all(|s| s.stopping.as_ref().is_some_and(|s| s.stop.is_empty())),
        "workers know no text"
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_sequence_on_decode() {
    let script = Script { end: End::Hang, ..Script::text("one two three") };
    let (cluster, _prefill, decode) = Cluster::with_pair(script).await;
    let body = with(completion(json!("go")), json!({ "stop": " thr" }));
    let answer = cluster.complete(COMPLETIONS, &body).await;
    assert_eq!(answer["choices"][0]["text"], "one two");
    decode.cancelled(1).await;
}

#[tokio::test]
async fn min_tokens_holds_stop_strings_off() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("a a a a a a")).await;
    let body = with(completion(json!("go")), json!({ "stop": " a", "min_tokens": 3 }));
    let answer = cluster.complete(COMPLETIONS, &body).await;
    assert_eq!(answer["choices"][0]["text"], "a a");
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn stop_tokens_and_ignored_ends() {
    let word = tokens("word");
    let mut answer = word.clone();
    answer.extend([TINY_EOS, 20, 30]);
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::tokens(answer)).await;

    let body = with(completion(json!("go")), json!({ "ignore_eos": true, "stop_token_ids": [30] }));
    let stopped = cluster.complete(COMPLETIONS, &body).await;
    let choice = &stopped["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["stop_reason"]), (&json!("stop"), &json!(30)));
    let text = choice["text"].as_str().expect("text");
    assert!(
        text.starts_with("word") && text.chars().count() == 5,
        "token 20 has text, 1 and 30 have none: {text}"
    );

    let ended = cluster.complete(COMPLETIONS, &completion(json!("go"))).await;
    assert_eq!(ended["choices"][0]["text"], "word");
    assert!(ended["choices"][0]["stop_reason"].is_null());

    let body = with(completion(json!("go")), json!({ "max_tokens": 1 }));
    let cut = cluster.complete(COMPLETIONS, &body).await;
    assert_eq!(
        (&cut["choices"][0]["finish_reason"], &cut["usage"]["completion_tokens"]),
        (&json!("length"), &json!(1))
    );
    assert_eq!(prefill.requests(3).await[2].stopping.as_ref().expect("stopping").max_tokens, Some(1));
}

#[tokio::test]
async fn every_choice_has_its_own_answer() {
    let script = Script { answers: vec![tokens("red"), tokens("green"), tokens("blue")], ..Script::text("") };
    let (cluster, _prefill, decode) = Cluster::with_pair(script).await;
    let body = with(chat("colours?"), json!({ "n": 3, "seed": -7 }));
    let answer = cluster.complete(CHAT, &body).await;
    let contents: Vec<_> = answer["choices"]
        .as_array()
        .expect("choices")
        .iter()
        .map(|c| c["message"]["content"].clone())
        .collect();
    assert_eq!(contents, ["red", "green", "blue"]);

    let chunks = cluster.stream(CHAT, &body).await;
    for (index, word) in [(0, "red"), (1, "green"), (2, "blue")] {
        assert_eq!(joined(&chunks, index, "/delta/content"), word);
    }
    let sequences = decode.requests(6).await;
    assert!(
        sequences
            .iter()
            .all(|s| s.sampling.as_ref().is_some_and(|s| s.seed == Some((-7_i64).cast_unsigned())))
    );
}

#[tokio::test]
async fn sampling_reaches_the_workers() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("x")).await;
    let body = with(
        chat("?"),
        json!({
            "temperature": 0.25, "top_p": 0.5, "top_k": 40, "min_p": 0.125, "seed": 42,
            "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5,
            "logit_bias": { "7": -100, "9": 2.5 }, "max_completion_tokens": 9, "max_tokens": 3,
        }),
    );
    cluster.complete(CHAT, &body).await;
    let sequence = prefill.requests(1).await.remove(0);
    let sampling = sequence.sampling.expect("sampling");
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (Some(0.25), Some(0.5), Some(40)));
    assert_eq!((sampling.min_p, sampling.seed), (Some(0.125), Some(42)));
    assert_eq!(sampling.repetition_penalty, Some(1.5));
    assert_eq!((sampling.presence_penalty, sampling.frequency_penalty), (Some(0.5), Some(-0.5)));
    assert_eq!(sampling.logit_bias.into_iter().collect::<Vec<_>>(), [(7, -100.0), (9, 2.5)]);
    assert_eq!(sequence.stopping.expect("stopping").max_tokens, Some(9), "the newer name wins");
}

#[tokio::test]
async fn chat_logprobs_have_bytes() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("hi")).await;
    let body = with(chat("?"), json!({ "logprobs": true, "top_logprobs": 2 }));
    let answer = cluster.complete(CHAT, &body).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("content");
    assert_eq!(content.len(), tokens("hi").len() + 1, "the end of sequence is a token as well");
    let text: String = content.iter().map(|token| token["token"].as_str().expect("token")).collect();
    assert_eq!(text, "hi<｜end▁of▁sentence｜>");
    for token in content {
        let bytes: Vec<u8> = serde_json::from_value(token["bytes"].clone()).expect("bytes");
        assert_eq!(token["token"], String::from_utf8_lossy(&bytes).as_ref());
        assert_eq!(token["logprob"], -0.5);
        assert_eq!(token["top_logprobs"].as_array().expect("top").len(), 2);
        assert_eq!(token["top_logprobs"][0]["token"], token["token"]);
    }
    let chunks = cluster.stream(CHAT, &body).await;
    let streamed: usize = chunks
        .iter()
        .filter_map(|chunk| chunk["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(streamed, content.len());
}

#[tokio::test]
async fn completion_logprobs_have_offsets() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("né ok")).await;
    let body = with(completion(json!("go")), json!({ "logprobs": 2, "return_token_ids": true }));
    let answer = cluster.complete(COMPLETIONS, &body).await;
    let choice = &answer["choices"][0];
    let logprobs = &choice["logprobs"];
    let count = choice["token_ids"].as_array().expect("token ids").len();
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().expect(list).len(), count, "{list}");
    }
    assert_eq!(logprobs["text_offset"][0], 0);
    let first = logprobs["tokens"][0].as_str().expect("token");
    assert_eq!(logprobs["text_offset"][1], first.chars().count());
    assert_eq!(logprobs["top_logprobs"][0][first], -0.5);

    // Offsets go on from chunk to chunk.
    let chunks = cluster.stream(COMPLETIONS, &body).await;
    let lists = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["text_offset"].as_array());
    let offsets: Vec<Value> = lists.flatten().cloned().collect();
    assert_eq!(&Value::from(offsets), &logprobs["text_offset"]);
}

/// The question of lm-evaluation-harness: a prompt by token ids, echoed with its log-probabilities.
#[tokio::test]
async fn a_prompt_is_echoed_with_its_log_probabilities() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("ok")).await;
    let prompt: Vec<u32> = tokens("né go on");
    let count = prompt.len();
    let body = with(completion(json!(prompt)), json!({ "echo": true, "logprobs": 1, "max_tokens": 1 }));
    let answer = cluster.complete(COMPLETIONS, &body).await;
    let choice = &answer["choices"][0];
    assert!(choice["text"].as_str().is_some_and(|text| text.starts_with("né go on") && text.len() > 9));
    let logprobs = &choice["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[list].as_array().expect(list).len(), count + 1, "{list}");
    }
    assert_eq!((&logprobs["token_logprobs"][0], &logprobs["top_logprobs"][0]), (&Value::Null, &Value::Null));
    for at in 1..count {
        let logprob = logprobs["token_logprobs"][at].as_f64().expect("a log-probability");
        assert!((logprob.exp() - 0.25).abs() < 1e-6, "token {at}");
        assert_eq!(logprobs["top_logprobs"][at].as_object().expect("alternatives").len(), 2, "token {at}");
    }
    assert_eq!(logprobs["token_logprobs"][count], -0.5, "the completion's own");

    // In a stream everything of the prompt comes first, and with max_tokens 0 nothing comes behind it.
    let body = with(body, json!({ "max_tokens": 0, "stream_options": { "include_usage": true } }));
    let chunks = cluster.stream(COMPLETIONS, &body).await;
    let lists = chunks.iter().filter_map(|chunk| chunk["choices"][0]["logprobs"]["tokens"].as_array());
    assert_eq!(lists.flatten().count(), count);
    let text: String = chunks.iter().filter_map(|chunk| chunk["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, "né go on");
    let usage = chunks.iter().find_map(|chunk| chunk["usage"].as_object()).expect("usage");
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(count), &json!(0)));

    let plain = cluster.complete(COMPLETIONS, &with(completion(json!("go")), json!({ "echo": true }))).await;
    assert_eq!(plain["choices"][0]["text"], "gook");
    assert!(plain["choices"][0]["logprobs"].is_null());
}

#[tokio::test]
async fn token_ids_as_vllm_has_them() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("hi there")).await;
    let mut generated = tokens("hi there");
    generated.push(TINY_EOS);

    let body = with(chat("?"), json!({ "return_token_ids": true }));
    let answer = cluster.complete(CHAT, &body).await;
    assert_eq!(answer["prompt_token_ids"], json!(prefill.requests(1).await[0].prompt));
    assert_eq!(answer["choices"][0]["token_ids"], json!(generated));
    let chunks = cluster.stream(CHAT, &body).await;
    assert_eq!(chunks[0]["prompt_token_ids"], answer["prompt_token_ids"]);
    let lists = chunks.iter().filter_map(|chunk| chunk["choices"][0]["token_ids"].as_array());
    assert_eq!(Value::from(lists.flatten().cloned().collect::<Vec<_>>()), json!(generated));

    let body = with(completion(json!([5, 6])), json!({ "return_token_ids": true }));
    let answer = cluster.complete(COMPLETIONS, &body).await;
    assert_eq!(answer["choices"][0]["prompt_token_ids"], json!([5, 6]));
    assert_eq!(answer["choices"][0]["token_ids"], json!(generated));
}

#[tokio::test]
async fn thinking_is_told_apart() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("hm, hm</think>\n\nYes.")).await;
    for how in [json!({ "thinking": true }), json!({ "chat_template_kwargs": { "thinking": true } })] {
        let body = with(chat("?"), how);
        let answer = cluster.complete(CHAT, &body).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!((&message["reasoning_content"], &message["content"]), (&json!("hm, hm"), &json!("Yes.")));
        let chunks = cluster.stream(CHAT, &body).await;
        assert_eq!(joined(&chunks, 0, "/delta/reasoning_content"), "hm, hm");
        assert_eq!(joined(&chunks, 0, "/delta/content"), "Yes.");
    }
    let think = tokens("<think>")[0];
    assert!(prefill.requests(1).await[0].prompt.contains(&think), "the prompt opens the mark");
    // Without the mark in prompt or answer, everything is content.
    let plain = cluster.complete(CHAT, &chat("?")).await;
    assert_eq!(plain["choices"][0]["message"]["content"], "hm, hm</think>\n\nYes.");
}

#[tokio::test]
async fn content_may_be_a_list_of_text_parts() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("x")).await;
    let parts = json!([{ "type": "text", "text": "one " }, { "type": "text", "text": "two" }]);
    let body = json!({ "model": MODEL, "messages": [
        { "role": "developer", "content": "Be brief." },
        { "role": "user", "content": parts, "name": "ada" },
        { "role": "assistant", "content": "yes", "reasoning_content": "hm", "tool_calls": null, "refusal": null },
        { "role": "user", "content": "go" },
    ]});
    cluster.complete(CHAT, &body).await;
    let ids = prefill.requests(1).await[0].prompt.iter().map(|&id| model::TokenId(id)).collect::<Vec<_>>();
    let text = crate::support::served_model().tokenizer.decode(&ids, false);
    assert!(text.contains("Be brief.") && text.contains("<｜User｜>one two<｜Assistant｜>yes"), "{text}");
}

#[tokio::test]
async fn identity_of_a_request_is_the_clients() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("x")).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let response = cluster
        .http
        .post(cluster.url(CHAT))
        .header("x-request-id", "my-request-1")
        .header("traceparent", format!("00-{trace}-00f067aa0ba902b7-01"))
        .json(&chat("?"))
        .send()
        .await
        .expect("answer");
    assert_eq!(response.headers()["x-request-id"], "my-request-1");
    let sequence = prefill.requests(1).await.remove(0);
    assert_eq!(sequence.request_id, "my-request-1");
    assert!(sequence.traceparent.contains(trace), "{}", sequence.traceparent);
    assert!(!sequence.traceparent.contains("00f067aa0ba902b7"), "a span of our own");

    let unnamed = cluster
        .http
        .get(cluster.url("/v1/models"))
        .header("x-request-id", "no spaces")
        .send()
        .await
        .expect("answer");
    assert_ne!(unnamed.headers()["x-request-id"], "no spaces");
}

#[tokio::test]
async fn models_and_metrics() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("x")).await;
    let (status, list) = cluster.get("/v1/models").await;
    assert_eq!(
        (status, &list["data"][0]["id"], &list["data"][0]["max_model_len"]),
        (200, &json!(MODEL), &json!(4096))
    );
    assert_eq!(cluster.get("/v1/models/tiny").await.1["object"], "model");
    let (status, missing) = cluster.get("/v1/models/deepseek-ai/other").await;
    assert_eq!((status, &missing["error"]["code"]), (404, &json!("model_not_found")));

    cluster.complete(CHAT, &chat("?")).await;
    let text =
        cluster.http.get(cluster.url("/metrics")).send().await.expect("answer").text().await.expect("text");
    for line in [
        "router_requests_total{door=\"http\",outcome=\"ok\"} 1",
        "router_workers{tier=\"prefill\"} 1",
        "router_workers{tier=\"expert\"} 0",
        "router_ttft_seconds_count 1",
        "router_sequences 0",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
    for hop in ["admission", "reserve", "prefill", "handoff", "decode"] {
        assert!(text.contains(&format!("router_hop_seconds_count{{hop=\"{hop}\"}} 1")), "{hop} in\n{text}");
    }
    assert_eq!(cluster.router.metrics_text(), text);
}
