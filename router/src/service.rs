//! What both front doors stand on: one way in for a request, whatever protocol it speaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use model::TokenId;

use crate::admission::{Admission, Admitted};
use crate::config::Config;
use crate::error::RequestError;
use crate::generate::{Generate, Prompt};
use crate::metrics::Metrics;
use crate::placement::Tier;
use crate::registry::Registry;
use crate::served_model::ServedModel;
use crate::session::{Session, SessionContext};

/// The router behind its doors.
pub(crate) struct Service {
    pub config: Config,
    pub model: Arc<ServedModel>,
    pub registry: Arc<Registry>,
    pub metrics: Arc<Metrics>,
    /// When the router started, seconds since 1970: the model's `created`.
    pub created_unix_s: u64,
    admission: Admission,
    draining: AtomicBool,
}

impl Service {
    pub fn new(config: Config, model: ServedModel, registry: Arc<Registry>, metrics: Arc<Metrics>) -> Self {
        let model = Arc::new(model);
        let admission = Admission::new(&config, Arc::clone(&model), Arc::clone(&metrics));
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        let created_unix_s = since_1970.map_or(0, |since| since.as_secs());
        Self { config, model, registry, metrics, created_unix_s, admission, draining: AtomicBool::new(false) }
    }

    /// Admits a request and starts its session. Dropping the session cancels the request on both tiers.
    ///
    /// # Errors
    /// Why it was not admitted; counted already.
    pub async fn generate(&self, generate: Generate) -> Result<Session, RequestError> {
        let mut outcome =
            Outcome { metrics: &self.metrics, door: generate.context.door, name: Some("cancelled") };
        match self.admit(generate).await {
            Ok(admitted) => {
                // From here on the session counts.
                outcome.name = None;
                Ok(Session::start(self.session_context(), admitted))
            }
            Err(error) => {
                outcome.name = Some(error.outcome());
                Err(error)
            }
        }
    }

    async fn admit(&self, generate: Generate) -> Result<Admitted, RequestError> {
        if self.draining() {
            return Err(RequestError::Draining);
        }
        self.admission.admit(generate, self.registry.cluster()).await
    }

    fn session_context(&self) -> SessionContext {
        SessionContext {
            model: Arc::clone(&self.model),
            registry: Arc::clone(&self.registry),
            metrics: Arc::clone(&self.metrics),
        }
    }

    /// Template and tokenizer alone.
    ///
    /// # Errors
    /// The model's name, the template or the tokenizer refuses.
    pub async fn tokenise(&self, model: Option<&str>, prompt: Prompt) -> Result<Vec<TokenId>, RequestError> {
        self.model.check_name(model)?;
        self.admission.tokenise(prompt).await.map(|(tokens, _)| tokens)
    }

    /// The metrics as Prometheus reads them.
    pub fn metrics_text(&self) -> String {
        let workers = self.registry.workers();
        for tier in Tier::ALL {
            self.metrics.workers(tier, workers.iter().filter(|worker| worker.tier == tier).count());
        }
        self.metrics.text()
    }

    /// From now on every new request is told to go elsewhere.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether [`Service::drain`] was called.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
}

/// Counts a request that did not become a session, also when its client left while it waited.
struct Outcome<'a> {
    metrics: &'a Metrics,
    door: &'static str,
    name: Option<&'static str>,
}

impl Drop for Outcome<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.name {
            self.metrics.request_ended(self.door, name);
        }
    }
}
