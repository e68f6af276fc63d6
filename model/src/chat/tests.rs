use serde_json::json;

use super::*;

fn open(files: &[(&str, &str)]) -> Result<Option<ChatTemplate>, ModelError> {
    let dir = tempfile::tempdir().expect("a directory");
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content).expect("writes");
    }
    ChatTemplate::open(dir.path())
}

fn template(source: &str) -> ChatTemplate {
    let config = json!({"chat_template": source, "bos_token": "<s>", "eos_token": {"content": "</s>"}});
    open(&[("tokenizer_config.json", &config.to_string())]).expect("compiles").expect("is there")
}

fn user(content: &str) -> Vec<ChatMessage> {
    vec![ChatMessage { role: "user".into(), content: content.into() }]
}

/// Renders with one user message "Hi".
fn rendered(source: &str) -> String {
    template(source).render(&user("Hi"), false, true, &Map::new()).expect("renders")
}

#[test]
fn every_place_a_template_may_be_in() {
    let string = r#"{"chat_template": "string"}"#;
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "listed"}]}"#;
    let check = |files: &[(&str, &str)], expected: Option<&str>| {
        let template = open(files).expect("opens");
        let text = template.map(|t| t.render(&[], false, false, &Map::new()).expect("renders"));
        assert_eq!(text.as_deref(), expected, "{files:?}");
    };
    check(&[], None);
    check(&[("tokenizer_config.json", "{}")], None);
    check(&[("tokenizer_config.json", string)], Some("string"));
    check(&[("tokenizer_config.json", list)], Some("listed"));
    check(&[("chat_template.jinja", "file")], Some("file"));
    check(&[("chat_template.jinja", "file"), ("tokenizer_config.json", string)], Some("file"));
}

#[test]
fn a_list_without_a_default_and_a_template_that_does_not_compile_are_refused() {
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "no"}]}"#;
    let error = open(&[("tokenizer_config.json", list)]).expect_err("no default").to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("default"), "{error}");
    let error = open(&[("chat_template.jinja", "{% if %}")]).expect_err("no Jinja").to_string();
    assert!(error.contains("chat_template.jinja"), "{error}");
}

#[test]
fn variables_of_a_template() {
    let source = "{{ bos_token }}{{ messages[0]['role'] }}:{{ messages[0].content }}{{ eos_token }}\
                  {% if add_generation_prompt %}!{% endif %}{% if thinking %}?{% endif %}{{ extra }}{{ pad_token }}";
    let template = template(source);
    let extra = json!({"extra": [1, "two"], "thinking": true, "bos_token": "overridden"});
    let extra = extra.as_object().expect("an object");
    let text = template.render(&user("Hi"), false, true, extra).expect("renders");
    assert_eq!(text, "<s>user:Hi</s>![1, 'two']");
    let text = template.render(&user("Hi"), true, false, &Map::new()).expect("renders");
    assert_eq!(text, "<s>user:Hi</s>?");
}

/// What chat templates in the wild use, with the results that Jinja gives.
#[test]
fn speaks_the_jinja_of_transformers() {
    for (source, expected) in [
        ("{% if true %}\n  {% set x = 1 %}\nx\n{% endif %}\n", "x\n"),
        ("{{ 'a</think>b'.split('</think>')[-1] }}", "b"),
        ("{{ ' a '.strip() }}|{{ 'ab'.startswith('a') }}|{{ 'ab'.upper() }}", "a|True|AB"),
        ("{{ 'a</think> b '.split('</think>') | last | trim }}", "b"),
        (
            "{% set ns = namespace(n=0) %}{% for m in [1,2] %}{% set ns.n = ns.n + m %}{% endfor %}{{ ns.n }}",
            "3",
        ),
        ("{% for x in [1,2,3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.content }}{% endfor %}", "0Hi"),
        ("{{ messages[0].name is defined }}{{ messages[0]['tool_calls'] is not none }}", "FalseTrue"),
        (
            "{{ {'b': 1, 'a': ['<x>', 'é', none, true]} | tojson }}",
            r#"{"b": 1, "a": ["<x>", "é", null, true]}"#,
        ),
        ("{{ {'a': [1]} | tojson(indent=2) }}", "{\n  \"a\": [\n    1\n  ]\n}"),
        ("{{ {'a': 1}.items() | list | length }}{{ {'a': 1}.get('b', 'none') }}", "1none"),
        ("{{ '<b>' }}", "<b>"),
    ] {
        assert_eq!(rendered(source), expected, "{source}");
    }
}

#[test]
fn a_template_s_own_refusal_is_told_apart() {
    let template = template("{{ raise_exception('roles must alternate') }}");
    let error = template.render(&user("Hi"), false, true, &Map::new()).expect_err("refuses");
    assert!(
        matches!(&error, ModelError::Template { source: TemplateError::Refused { message }, .. }
                 if message == "roles must alternate"),
        "{error:?}"
    );
    // From within a macro the interpreter wraps the error once more.
    let template = self::template("{% macro m() %}{{ raise_exception('no') }}{% endmacro %}{{ m() }}");
    let error = template.render(&[], false, true, &Map::new()).expect_err("refuses");
    assert!(
        matches!(&error, ModelError::Template { source: TemplateError::Refused { .. }, .. }),
        "{error:?}"
    );
}

#[test]
fn a_template_that_would_never_end_ends() {
    for endless in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    ] {
        let error = template(endless).render(&[], false, true, &Map::new()).expect_err(endless);
        assert!(matches!(error, ModelError::Template { source: TemplateError::Engine(_), .. }), "{error:?}");
    }
}

/// R1's template always opens a thought, V3.1's when asked to, V3's never.
#[test]
fn sees_whether_the_answer_begins_inside_a_thought() {
    for (rendered, opens) in [
        ("<｜User｜>Hi<｜Assistant｜><think>\n", true),
        ("<｜User｜>Hi<｜Assistant｜><think>", true),
        ("<｜User｜>Hi<｜Assistant｜></think>", false),
        ("<｜User｜>Hi<｜Assistant｜>", false),
        ("<｜User｜>What is <think>?<｜Assistant｜>", false),
        ("", false),
    ] {
        assert_eq!(ChatTemplate::opens_thinking(rendered), opens, "{rendered}");
    }
}
