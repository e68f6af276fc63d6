use super::*;

fn check(toml: &str, expected: Result<(), &str>) {
    let outcome = toml::from_str::<Config>(toml)
        .map_err(|e| e.to_string())
        .and_then(|config| config.validate().map_err(|e| e.to_string()));
    match expected {
        Ok(()) => assert_eq!(outcome, Ok(()), "{toml}"),
        Err(part) => {
            let message = outcome.expect_err(toml);
            assert!(message.contains(part), "{message:?} does not name {part:?}");
        }
    }
}

const MODEL: &str = "[model]\npath = 'model/tiny'\n";

fn with_worker(lines: &str) -> String {
    format!(
        "{MODEL}[[worker]]\nid = 'prefill-0'\nrole = 'prefill'\ncontrol = '127.0.0.1:1'\nfabric = '127.0.0.1:2'\n{lines}"
    )
}

#[test]
fn what_is_wrong_is_named() {
    check(MODEL, Ok(()));
    check(&with_worker(""), Ok(()));
    check("", Err("model"));
    check(&format!("{MODEL}colour = 1\n"), Err("colour"));
    check(&format!("{MODEL}numerics = 'fp4'\n"), Err("numerics"));
    check(&format!("{MODEL}kv_format = 'int8'\n"), Err("kv_format"));
    check(&format!("{MODEL}[engine]\nkv_blocks_max = 0\n"), Err("engine.kv_blocks_max"));
    check(&format!("{MODEL}[engine]\nblocks = 1\n"), Err("blocks"));
    check(&format!("{MODEL}[engine]\nstep_tokens_max = 4096\n"), Err("expert.dispatch_tokens_max"));
    check(&format!("{MODEL}[engine]\nstep_tokens_max = 8\n"), Err("decode.batch_max"));
    check(&format!("{MODEL}[cache]\ndisk_bytes = 1000\n"), Err("cache.disk_path"));
    check(&format!("{MODEL}[cache]\ndisk_path = '/tmp'\n"), Err("cache.disk_bytes"));
    check(
        &format!("{MODEL}[cache]\nhost_bytes = 0\ndisk_bytes = 1000\ndisk_path = '/tmp'\n"),
        Err("cache.host_bytes"),
    );
    check(&with_worker("threads = 0\n"), Err("worker[0].threads"));
    check(&with_worker("threads = -1\n"), Err("threads"));
    check(&with_worker("admin = 'here'\n"), Err("admin"));
    let rail = "'127.0.0.1:3'";
    check(&with_worker(&format!("fabric_rails = [{rail}]\n")), Ok(()));
    check(&with_worker("fabric_rails = ['127.0.0.1:0', '127.0.0.1:0']\n"), Ok(()));
    check(&with_worker("fabric_rails = ['eth1']\n"), Err("fabric_rails"));
    check(&with_worker(&format!("fabric_rails = [{rail}, {rail}]\n")), Err("worker[0].fabric_rails"));
    check(&with_worker("fabric_rails = ['127.0.0.1:2']\n"), Err("127.0.0.1:2 is there twice"));
    check(&with_worker(&format!("fabric_rails = [{}]\n", [rail; 9].join(", "))), Err("at most 8"));
    let expert = with_worker(&format!("fabric_rails = [{rail}]\n")).replace("'prefill'\n", "'expert'\n");
    check(&expert, Err("worker[0].fabric_rails"));
    check(&with_worker("").replace("'prefill'\n", "'oracle'\n"), Err("oracle"));
    check(&with_worker("").replace("'prefill'\n", "'router'\n"), Err("worker[0].role"));
    check(&with_worker("").replace("'prefill-0'", "'a b'"), Err("worker[0].id"));
    let twice = format!(
        "{}[[worker]]\nid = 'prefill-0'\nrole = 'decode'\ncontrol = '127.0.0.1:3'\nfabric = '127.0.0.1:4'\n",
        with_worker("")
    );
    check(&twice, Err("taken by another worker"));
}

#[test]
fn a_written_configuration_reads_back_the_same() {
    let config: Config = toml::from_str(&with_worker("threads = 3\n")).expect("valid");
    let again: Config = toml::from_str(&toml::to_string(&config).expect("writes")).expect("reads");
    assert_eq!(config.workers, again.workers);
    assert_eq!(config.model, again.model);
}

#[test]
fn the_documented_cluster_is_valid_and_shows_defaults() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cluster.toml");
    let config = Config::load(&path).expect("docs/cluster.toml");
    assert_eq!(config.workers_of(Role::Expert).count(), 8);
    assert!(config.security.is_some());
    // What it shows are the defaults, as it says.
    assert_eq!(config.engine, EngineSection::default());
    assert_eq!(config.fabric, FabricSection::default());
    assert_eq!(config.cache, CacheSection::default());
    assert_eq!(config.prefill, prefill::Config::default());
    assert_eq!(config.decode, decode::Config::default());
    assert_eq!(config.expert, expert::Config::default());
    let router = router::Config::default();
    let (http_listen, grpc_listen, control_listen) =
        (router.http_listen, router.grpc_listen, router.control_listen);
    assert_eq!(router::Config { http_listen, grpc_listen, control_listen, ..config.router }, router);
}
