//! Whatever comes in at any port: a clear answer or a closed connection, nothing dies, the next request is served.

mod support;

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpStream, UdpSocket},
    process::Command,
    time::Duration,
};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use support::{Up, demo, http};

async fn start() -> Up {
    tokio::task::spawn_blocking(|| Up::start("--quiet")).await.expect("up")
}

async fn still_serves(url: &str) {
    let body = json!({
        "model": "trireme-tiny", "stream": true, "stream_options": { "include_usage": true },
        "max_tokens": 4, "ignore_eos": true, "prompt": [0, 5, 6],
    });
    let seen = http(url).stream("/v1/completions", &body, |_| {}).await.expect("the next request is served");
    assert_eq!(seen.completion_tokens(), Some(4));
}

/// The status and the error object of a body that must be refused.
async fn refused(url: &str, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let request =
        reqwest::Client::new().post(format!("{url}{path}")).header("content-type", "application/json");
    let response = request.body(body).send().await.expect("an answer");
    let status = response.status().as_u16();
    let body: Value = response.json().await.expect("OpenAI's error object");
    assert!(body["error"]["message"].as_str().is_some_and(|m| !m.is_empty()), "{body}");
    assert!(body["error"]["type"].is_string(), "{body}");
    (status, body["error"].clone())
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_what_is_wrong() {
    let up = start().await;
    let chat = |extra: Value| {
        let mut body = json!({ "model": "trireme-tiny", "messages": [{ "role": "user", "content": "Hi" }] });
        body.as_object_mut().expect("object").extend(extra.as_object().expect("object").clone());
        body.to_string()
    };
    let tokens = |ids: &str| format!("{{\"model\":\"trireme-tiny\",\"prompt\":{ids},\"max_tokens\":4}}");
    let long = json!(vec![5; 5000]).to_string();
    for (what, path, body, status, names) in [
        ("malformed JSON", "/v1/chat/completions", "{\"model\": ".to_owned(), 400, ""),
        ("no object", "/v1/chat/completions", "[1]".to_owned(), 400, ""),
        ("an unknown field", "/v1/chat/completions", chat(json!({ "temprature": 1 })), 400, "temprature"),
        ("a negative limit", "/v1/chat/completions", chat(json!({ "max_tokens": -1 })), 400, "max_tokens"),
        ("no tokens at all", "/v1/chat/completions", chat(json!({ "max_tokens": 0 })), 400, "max_tokens"),
        ("a hot temperature", "/v1/chat/completions", chat(json!({ "temperature": 9 })), 400, "temperature"),
        ("a wrong kind", "/v1/chat/completions", chat(json!({ "top_p": "high" })), 400, "top_p"),
        ("too many choices", "/v1/chat/completions", chat(json!({ "n": 1000 })), 400, "n"),
        ("an unknown model", "/v1/chat/completions", chat(json!({ "model": "gpt-4" })), 404, "gpt-4"),
        ("a prompt over the context", "/v1/completions", tokens(&long), 400, "context"),
        (
            "more tokens than the context",
            "/v1/completions",
            tokens("[5]").replace(":4}", ":99999}"),
            400,
            "99999",
        ),
        ("an id past the vocabulary", "/v1/completions", tokens("[4096]"), 400, "4096"),
        ("a negative id", "/v1/completions", tokens("[-1]"), 400, "prompt"),
        ("ids that are no numbers", "/v1/completions", tokens("[\"a\", 1]"), 400, "prompt"),
        ("an empty prompt list", "/v1/completions", tokens("[]"), 400, "prompt"),
    ] {
        let (seen, error) = refused(&up.url, path, body).await;
        assert_eq!(seen, status, "{what}: {error}");
        let text = error.to_string();
        assert!(text.contains(names), "{what}: {names:?} is not named in {text}");
    }
    let (status, _) = refused(&up.url, "/v1/chat/completions", b"{\"model\":\"\xff\xfe\"}".to_vec()).await;
    assert_eq!(status, 400, "invalid UTF-8");
    // Ids of bytes that are no UTF-8 together: served, the text has replacement characters.
    let (status, _) = {
        let body = tokens("[0, 200, 201, 202]");
        let request = reqwest::Client::new().post(format!("{}/v1/completions", up.url));
        let response =
            request.header("content-type", "application/json").body(body).send().await.expect("an answer");
        (response.status().as_u16(), ())
    };
    assert_eq!(status, 200, "token ids of incomplete characters are tokens like others");
    still_serves(&up.url).await;
    assert_eq!(up.stop(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_fifty_megabytes_is_refused() {
    let up = start().await;
    let address: SocketAddr = up.url.trim_start_matches("http://").parse().expect("an address");
    // By hand: a client library may give up writing before it reads the answer.
    let answer = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).expect("connects");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            50 << 20
        );
        stream.write_all(head.as_bytes()).expect("the head");
        let chunk = vec![b' '; 1 << 20];
        for _ in 0..50 {
            if stream.write_all(&chunk).is_err() {
                break;
            }
        }
        let mut answer = [0; 12];
        stream.read_exact(&mut answer).expect("an answer before the connection closes");
        String::from_utf8_lossy(&answer).into_owned()
    })
    .await
    .expect("the client");
    assert!(answer.ends_with("413"), "{answer}");
    still_serves(&up.url).await;
    assert_eq!(up.stop(), Some(0));
}

/// Random bytes and half-finished protocols at every TCP and UDP port of the cluster.
#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_every_port_harms_nobody() {
    let up = start().await;
    let text = std::fs::read_to_string(up.state.join("cluster.toml")).expect("the configuration");
    let config: toml::Table = text.parse().expect("TOML");
    let mut tcp = vec![up.url.trim_start_matches("http://"), up.grpc.trim_start_matches("http://")];
    tcp.push(config["router"]["control_listen"].as_str().expect("control"));
    let mut udp = Vec::new();
    for worker in config["worker"].as_array().expect("workers") {
        tcp.extend(["control", "admin"].map(|key| worker[key].as_str().expect(key)));
        udp.push(worker["fabric"].as_str().expect("fabric"));
    }
    const SEED: u64 = 7;
    println!("seed {SEED}");
    let mut rng = StdRng::seed_from_u64(SEED);
    let mut garbage = |length: usize| {
        let mut bytes = vec![0; length];
        rng.fill_bytes(&mut bytes);
        bytes
    };
    let openings: [&[u8]; 5] = [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n",
    ];
    for address in &tcp {
        for opening in openings {
            let mut stream = TcpStream::connect(address).expect("every port accepts");
            // The other end may close at any byte: that is a fine answer to garbage.
            let _ = stream.write_all(opening);
            let _ = stream.write_all(&garbage(4096));
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    for address in &udp {
        for length in [0, 1, 20, 1200, 60_000] {
            for _ in 0..20 {
                socket.send_to(&garbage(length), address).expect("sent");
            }
        }
    }
    still_serves(&up.url).await;
    // The same processes: nobody was restarted.
    for (id, pid) in &up.workers {
        assert!(std::path::Path::new(&format!("/proc/{pid}")).exists(), "{id} ({pid}) is gone");
    }
    assert_eq!(up.stop(), Some(0));
}

fn trireme(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_trireme")).args(arguments).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{arguments:?}: {text}");
    (output.status.success(), text)
}

fn copy_of_demo(target: &std::path::Path) {
    for file in [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        std::fs::copy(demo().join(file), target.join(file)).expect("copied");
    }
}

#[test]
fn a_broken_checkpoint_is_named() {
    let check = |spoil: &dyn Fn(&std::path::Path), names: &[&str]| {
        let folder = tempfile::tempdir().expect("a folder");
        copy_of_demo(folder.path());
        spoil(folder.path());
        for command in ["inspect", "up"] {
            let path = folder.path().to_str().expect("UTF-8");
            let arguments = match command {
                "up" => vec!["up", "--port", "0", "--model", path],
                _ => vec!["inspect", path],
            };
            let (success, text) = trireme(&arguments);
            assert!(!success, "{command}");
            assert!(names.iter().all(|name| text.contains(name)), "{command}: {names:?} in {text}");
        }
    };
    let truncate = |length: u64| {
        move |folder: &std::path::Path| {
            let file =
                std::fs::File::options().write(true).open(folder.join("model.safetensors")).expect("opens");
            file.set_len(length).expect("cut");
        }
    };
    check(&truncate(20_000_000), &["model.safetensors"]);
    check(&truncate(100), &["model.safetensors"]);
    check(&truncate(0), &["model.safetensors"]);
    let edit = |from: &'static str, to: &'static str| {
        move |folder: &std::path::Path| {
            let file = folder.join("config.json");
            let text = std::fs::read_to_string(&file).expect("reads");
            assert!(text.contains(from));
            std::fs::write(file, text.replace(from, to)).expect("writes");
        }
    };
    check(&edit("\"hidden_size\": 384", "\"hidden_size\": 512"), &["model."]);
    check(&edit("\"hidden_size\": 384", "\"hidden_size\": -4"), &["hidden_size"]);
    let other = |folder: &std::path::Path| {
        edit("\"deepseek_v3\"", "\"llama\"")(folder);
        edit("DeepseekV3ForCausalLM", "LlamaForCausalLM")(folder);
    };
    check(&other, &["llama"]);
    check(&|folder| std::fs::remove_file(folder.join("config.json")).expect("removed"), &["config.json"]);
}

/// Stopped before it is up: nothing of it stays, its private key least of all.
#[test]
fn an_early_stop_leaves_nothing_behind() {
    let temporary = tempfile::tempdir().expect("a folder");
    let mut child = Command::new(env!("CARGO_BIN_EXE_trireme"))
        .args(["up", "--port", "0", "--grpc-port", "0"])
        .env("TMPDIR", temporary.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .expect("starts");
    let state = temporary.path().join(format!("trireme-{}", child.id()));
    let begin = std::time::Instant::now();
    while !state.exists() {
        assert!(begin.elapsed() < support::PATIENCE, "it makes its folder");
        std::thread::sleep(Duration::from_millis(1));
    }
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(killed.expect("kill").success());
    assert_eq!(child.wait().expect("ends").code(), Some(0));
    assert!(!state.exists(), "{}", state.display());
}

#[test]
fn a_wrong_flag_or_configuration_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("cluster.toml");
    std::fs::write(&file, "[model]\npath = 'model/tiny'\ncolour = 'red'\n").expect("writes");
    let file = file.to_str().expect("UTF-8");
    for (arguments, names) in [
        (vec!["router", "--config", file], "colour"),
        (vec!["decode", "--config", "/nowhere.toml"], "/nowhere.toml"),
        (vec!["up", "--model", "/nowhere"], "/nowhere"),
        (vec!["up", "--prefill", "0"], "--prefill"),
        (vec!["up", "--numerics", "fp4"], "fp4"),
        (vec!["up", "--numerics", "reference", "--kv-format", "bf16"], "bf16"),
        (vec!["up", "--expert", "17"], "16 routed experts"),
        (vec!["generate", "--input-file", "/nowhere.txt"], "/nowhere.txt"),
    ] {
        let (success, text) = trireme(&arguments);
        assert!(!success && text.contains(names), "{arguments:?}: {names:?} in {text}");
    }
}
