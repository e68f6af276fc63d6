use clap::Parser;
use model::TokenId;

use super::*;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn args(text: &std::path::Path, flags: &str) -> Args {
    let line = format!("perplexity --threads 1 --text {} {flags}", text.display());
    Cli::parse_from(line.split_whitespace()).args
}

fn text() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().expect("a file");
    let story = "Once upon a time, in a quiet forest, there lived a little fox named Oscar. The trees were tall and \
                 old. One day, Oscar found an old map under a bush. There was a big red X on it. \"A treasure map!\" he \
                 cried. He ran to Louis the bear cub. \"Will you come with me to find the treasure?\"";
    std::fs::write(file.path(), story).expect("written");
    file
}

/// Every token is scored once and has the context promised, whatever the lengths.
#[test]
fn windows_score_every_token_once() {
    for tokens in [0, 1, 2, 7, 8, 9, 63, 100] {
        for window in [1, 2, 8, 50, 200] {
            for stride in [1, 3, window] {
                let plan = windows(tokens, window, stride);
                let scored: Vec<usize> = plan.iter().flat_map(|w| w.scored..w.text.end).collect();
                let about = format!("{tokens} tokens, window {window}, stride {stride}: {plan:?}");
                assert_eq!(scored, (0..tokens).collect::<Vec<_>>(), "{about}");
                for (number, w) in plan.iter().enumerate() {
                    assert!(w.text.len() <= window && w.text.start <= w.scored, "{about}");
                    let context = w.scored - w.text.start;
                    assert!(number == 0 || context >= window.saturating_sub(stride.min(window)), "{about}");
                }
            }
        }
    }
}

#[test]
fn a_loss_is_the_negative_log_of_the_probability() {
    let logits = [1.0f32.ln(), 3.0f32.ln(), 4.0f32.ln()];
    for (token, probability) in [(0, 0.125f64), (1, 0.375), (2, 0.5)] {
        assert!((score::loss(&logits, TokenId(token)) + probability.ln()).abs() < 1e-6);
    }
    assert_eq!(score::loss(&logits, TokenId(9)), f64::INFINITY);
    assert!(
        (score::loss(&[1000.0, 1000.0], TokenId(0)) - std::f64::consts::LN_2).abs() < 1e-9,
        "no overflow"
    );
}

/// A story in the demo model's manner is nearly known to it; and windows that overlap almost whole score as one does.
#[tokio::test]
async fn the_demo_model_predicts_its_own_kind_of_story() {
    let text = text();
    let whole = measure(&args(text.path(), "")).await.expect("a figure");
    assert!(whole.tokens > 60 && whole.perplexity < 4.0 && whole.perplexity > 1.0, "{whole:?}");
    assert_eq!(whole.bytes as u64, std::fs::metadata(text.path()).expect("a file").len());
    let by_position: usize = whole.by_position.iter().map(|bucket| bucket.tokens).sum();
    assert_eq!(by_position, whole.tokens);
    let cut = measure(&args(text.path(), "--window 64 --stride 24")).await.expect("a figure");
    assert_eq!(cut.tokens, whole.tokens);
    assert!((cut.loss - whole.loss).abs() < 0.3, "{} {}", cut.loss, whole.loss);
    let short = measure(&args(text.path(), "--window 8 --stride 7")).await.expect("a figure");
    assert!(short.loss > whole.loss + 0.3, "less context predicts worse: {} {}", short.loss, whole.loss);
    let reference = measure(&args(text.path(), "--numerics reference")).await.expect("a figure");
    assert!((reference.loss - whole.loss).abs() < 0.05, "{} {}", reference.loss, whole.loss);
    assert!(render(&whole).contains("perplexity by position"));
}

#[tokio::test]
async fn what_does_not_fit_is_refused_by_name() {
    let file = text();
    for (flags, expected) in [
        ("--window 5000", "--window is 5000"),
        ("--window 64 --stride 64", "--stride is 64"),
        ("--model /nowhere", "/nowhere"),
    ] {
        let error = format!("{:#}", measure(&args(file.path(), flags)).await.expect_err(flags));
        assert!(error.contains(expected), "{flags}: {error}");
    }
    let missing = std::path::Path::new("/nowhere/text");
    let error = format!("{:#}", measure(&args(missing, "")).await.expect_err("no text"));
    assert!(error.contains("--text /nowhere/text"), "{error}");
}
