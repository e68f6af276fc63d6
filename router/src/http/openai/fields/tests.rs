use serde_json::json;

use super::Fields;
use crate::error::{FieldProblem, RequestError};

fn fields(body: serde_json::Value) -> Fields {
    Fields::parse(body.to_string().as_bytes()).expect("an object")
}

#[track_caller]
fn fails_with<T: std::fmt::Debug>(result: Result<T, RequestError>, name: &str, problem: &FieldProblem) {
    match result.expect_err("must fail") {
        RequestError::Field { field, problem: found } => {
            assert_eq!((field.as_ref(), &found), (name, problem))
        }
        other => panic!("another error: {other}"),
    }
}

#[test]
fn what_nobody_took_is_an_error() {
    let mut all = fields(json!({ "a": 1, "b": null, "c": "x", "d": true }));
    assert_eq!(all.take::<u32>("a", "a number").expect("fits"), Some(1));
    assert_eq!(all.take::<u32>("b", "a number").expect("null is absent"), None);
    assert_eq!(all.take::<u32>("e", "a number").expect("absent"), None);
    all.ignore(&["c"]);
    fails_with(all.finish(), "d", &FieldProblem::Unknown);
    fields(json!({ "whatever": null })).finish().expect("null asks for nothing");
}

#[test]
fn paths_reach_into_the_body() {
    let mut nested = Fields::nested("messages[2]".to_owned(), json!({ "role": 5 })).expect("an object");
    let expected = FieldProblem::Type { expected: "a string" };
    fails_with(nested.take::<String>("role", "a string"), "messages[2].role", &expected);
    fails_with(
        nested.require::<String>("content", "a string"),
        "messages[2].content",
        &FieldProblem::Missing,
    );
    let expected = FieldProblem::Type { expected: "an object" };
    fails_with(Fields::nested("x".to_owned(), json!(3)), "x", &expected);
}

#[test]
fn values_that_ask_for_nothing_pass() {
    for value in [json!(null), json!(false), json!([]), json!({}), json!("none"), json!("")] {
        fields(json!({ "tools": value })).refuse(&[("tools", "no")]).expect("asks for nothing");
    }
    for value in [json!(true), json!([1]), json!({ "a": 1 }), json!("required"), json!(0)] {
        let result = fields(json!({ "tools": value })).refuse(&[("tools", "no")]);
        fails_with(result, "tools", &FieldProblem::Unsupported("no"));
    }
}
