//! `trireme.v1.Inference` as a gRPC client sees it, with standard health and reflection.

use proto::v1::inference_client::InferenceClient;
use proto::v1::{self, generate_request, tokenize_request};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::support::{Cluster, MODEL, PrefillBehaviour, Script, TINY_EOS, config, tokens};

pub async fn channel(cluster: &Cluster) -> Channel {
    let endpoint =
        Endpoint::from_shared(format!("http://{}", cluster.router.grpc_address())).expect("address");
    endpoint.connect().await.expect("connects")
}

pub fn text(prompt: &str) -> v1::GenerateRequest {
    v1::GenerateRequest {
        prompt: Some(generate_request::Prompt::Text(prompt.to_owned())),
        ..v1::GenerateRequest::default()
    }
}

async fn generate(
    cluster: &Cluster,
    request: v1::GenerateRequest,
) -> Result<Vec<v1::GenerateResponse>, tonic::Status> {
    let mut client = InferenceClient::new(channel(cluster).await);
    let mut stream = client.generate(request).await?.into_inner();
    let mut responses = Vec::new();
    while let Some(response) = stream.message().await? {
        responses.push(response);
    }
    Ok(responses)
}

#[tokio::test]
async fn a_generation_streams() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("hello there")).await;
    let request = v1::GenerateRequest {
        model: MODEL.to_owned(),
        request_id: "grpc-1".to_owned(),
        sampling: Some(v1::Sampling { logprobs: Some(1), ..v1::Sampling::default() }),
        ..text("go")
    };
    let responses = generate(&cluster, request).await.expect("streams");
    assert!(responses.iter().all(|response| response.request_id == "grpc-1"));
    let all: String = responses.iter().map(|response| response.text.as_str()).collect();
    assert_eq!(all, "hello there");
    let generated: Vec<u32> = responses.iter().flat_map(|r| &r.tokens).map(|token| token.token_id).collect();
    assert_eq!(generated.len(), tokens("hello there").len() + 1);
    assert_eq!(generated.last(), Some(&TINY_EOS));
    assert!(
        responses
            .iter()
            .flat_map(|r| &r.tokens)
            .all(|token| token.logprob == Some(-0.5) && token.top.len() == 1)
    );

    let (last, rest) = responses.split_last().expect("responses");
    let usage = last.usage.as_ref().expect("the very last message carries usage");
    assert_eq!(usage.completion_tokens as usize, generated.len());
    assert!(usage.timings.is_some());
    assert!(rest.iter().all(|response| response.usage.is_none()));
    assert_eq!(rest.last().expect("responses").finish_reason(), v1::FinishReason::Stop);
    assert_eq!(prefill.requests(1).await[0].request_id, "grpc-1");
}

#[tokio::test]
async fn chats_tokens_choices_and_stop_strings() {
    let (cluster, prefill, _decode) = Cluster::with_pair(Script::text("hm</think>so END")).await;
    let user = v1::ChatMessage { role: "user".to_owned(), content: "?".to_owned() };
    let request = v1::GenerateRequest {
        prompt: Some(generate_request::Prompt::Chat(v1::Chat { messages: vec![user], thinking: true })),
        stopping: Some(v1::Stopping { stop: vec![" EN".to_owned()], ..v1::Stopping::default() }),
        n: 2,
        ..v1::GenerateRequest::default()
    };
    let responses = generate(&cluster, request).await.expect("streams");
    for index in 0..2 {
        let own = || responses.iter().filter(|response| response.index == index && response.usage.is_none());
        assert_eq!(own().map(|response| response.reasoning.as_str()).collect::<String>(), "hm");
        assert_eq!(own().map(|response| response.text.as_str()).collect::<String>(), "so");
        let last = own().next_back().expect("responses");
        assert_eq!((last.finish_reason(), last.stop_reason.as_str()), (v1::FinishReason::Stop, " EN"));
    }
    let ids = v1::TokenIds { ids: vec![9, 8, 7] };
    let request = v1::GenerateRequest {
        prompt: Some(generate_request::Prompt::TokenIds(ids)),
        ..v1::GenerateRequest::default()
    };
    generate(&cluster, request).await.expect("streams");
    assert_eq!(prefill.requests(3).await[2].prompt, [9, 8, 7]);
}

#[tokio::test]
async fn models_and_tokens() {
    let cluster = Cluster::start(config()).await;
    let mut client = InferenceClient::new(channel(&cluster).await);
    let models = client.list_models(v1::ListModelsRequest {}).await.expect("lists").into_inner().models;
    assert_eq!((models[0].id.as_str(), models[0].context_tokens_max), (MODEL, 4096));
    let prompt = Some(tokenize_request::Prompt::Text("some text".to_owned()));
    let request = v1::TokenizeRequest { model: String::new(), prompt };
    let ids = client.tokenize(request).await.expect("tokenises").into_inner().token_ids;
    assert_eq!((ids[0], &ids[1..]), (0, tokens("some text").as_slice()));
}

#[tokio::test]
async fn errors_have_codes_and_name_fields() {
    let (cluster, _prefill, _decode) = Cluster::with_pair(Script::text("x")).await;
    let sampling = |sampling| v1::GenerateRequest { sampling: Some(sampling), ..text("go") };
    let stopping = |stopping| v1::GenerateRequest { stopping: Some(stopping), ..text("go") };
    let ids = |ids| v1::GenerateRequest {
        prompt: Some(generate_request::Prompt::TokenIds(v1::TokenIds { ids })),
        ..v1::GenerateRequest::default()
    };
    for (request, code, word) in [
        (v1::GenerateRequest::default(), Code::InvalidArgument, "prompt"),
        (v1::GenerateRequest { model: "other".to_owned(), ..text("go") }, Code::NotFound, "other"),
        (v1::GenerateRequest { n: 17, ..text("go") }, Code::InvalidArgument, "n"),
        (
            v1::GenerateRequest { request_id: "x".repeat(129), ..text("go") },
            Code::InvalidArgument,
            "request_id",
        ),
        (
            sampling(v1::Sampling { temperature: Some(f32::NAN), ..Default::default() }),
            Code::InvalidArgument,
            "temperature",
        ),
        (
            stopping(v1::Stopping { max_tokens: Some(0), ..Default::default() }),
            Code::InvalidArgument,
            "max_tokens",
        ),
        (
            stopping(v1::Stopping { stop: vec![String::new()], ..Default::default() }),
            Code::InvalidArgument,
            "stop",
        ),
        (ids(vec![]), Code::InvalidArgument, "prompt"),
        (ids(vec![4096]), Code::InvalidArgument, "4096"),
        (ids(vec![5; 4096]), Code::OutOfRange, "context"),
    ] {
        let status = generate(&cluster, request).await.expect_err("must be refused");
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(word), "{word}: {status}");
    }
    generate(&cluster, text("go")).await.expect("the next request is served");
}

#[tokio::test]
async fn a_dropped_stream_cancels_on_both_tiers() {
    let script = Script { prefill: PrefillBehaviour::Hang, ..Script::text("x") };
    let (cluster, prefill, decode) = Cluster::with_pair(script).await;
    let mut client = InferenceClient::new(channel(&cluster).await);
    let stream = client.generate(text("go")).await.expect("begins");
    prefill.requests(1).await;
    drop(stream);
    prefill.cancelled(1).await;
    decode.cancelled(1).await;
}

#[tokio::test]
async fn keys_are_asked_for_here_too() {
    let config = router::Config { api_keys_sha256: vec!["ab".repeat(32)], ..config() };
    let (cluster, _prefill, _decode) = Cluster::with_pair_and(config, Script::text("x")).await;
    let status = generate(&cluster, text("go")).await.expect_err("must be refused");
    assert_eq!(status.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn health_follows_the_workers() {
    let cluster = Cluster::start(config()).await;
    let mut client = HealthClient::new(channel(&cluster).await);
    let request = HealthCheckRequest { service: "trireme.v1.Inference".to_owned() };
    let mut watch = client.watch(request).await.expect("watches").into_inner();
    let mut wait_for = async |wanted: ServingStatus| {
        while watch.message().await.expect("streams").expect("more").status() != wanted {}
    };
    wait_for(ServingStatus::NotServing).await;
    let _prefill = crate::support::FakeWorker::prefill(&cluster, "prefill-0", Script::text("x")).await;
    let _decode = crate::support::FakeWorker::decode(&cluster, "decode-0", Script::text("x")).await;
    wait_for(ServingStatus::Serving).await;
}

#[tokio::test]
async fn reflection_describes_the_services_in_both_versions() {
    use tonic_reflection::pb::{v1, v1alpha};
    let cluster = Cluster::start(config()).await;
    let channel = channel(&cluster).await;

    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers =
        client.server_reflection_info(tokio_stream::iter([request])).await.expect("answers").into_inner();
    let answer = answers.message().await.expect("answers").expect("one").message_response;
    let Some(v1::server_reflection_response::MessageResponse::ListServicesResponse(list)) = answer else {
        panic!("no list of services: {answer:?}");
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(names.contains(&"trireme.v1.Inference".to_owned()), "{names:?}");
    assert!(!names.contains(&"trireme.v1.Prefill".to_owned()), "what is not served here is not listed");

    let symbol = "trireme.v1.Inference".to_owned();
    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            symbol,
        )),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers =
        client.server_reflection_info(tokio_stream::iter([request])).await.expect("answers").into_inner();
    let answer = answers.message().await.expect("answers").expect("one").message_response;
    assert!(matches!(
        answer,
        Some(v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_))
    ));
}
