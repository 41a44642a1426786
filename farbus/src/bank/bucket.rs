//! What went wrong with a bucket, in words of ours: which service, which bucket, and what to do. What the service or the network said stays behind it.
//!
//! "cannot reach `https://objects.example`" where nobody listens there, "access to the bucket backups is denied" where the key may not, "this host's clock and that
//! of `https://objects.example` differ too much" where a signature is too old.

use std::error::Error;
use std::io::ErrorKind;

use farbus_machine_bank::store::StoreError;

/// What failed, and what to do.
pub type Told = (String, String);

const AGAIN: &str = "run the same again: what was stored is found, and nothing half-done is seen";
const KEYS: &str = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_SESSION_TOKEN where they are lent";

/// The same for an error of a store in `bucket`; nothing for what has no service's part in it.
pub fn told(error: &StoreError, bucket: &str) -> Option<Told> {
    told_of(error, bucket, &|name| std::env::var(name).ok())
}

fn told_of(error: &StoreError, bucket: &str, variable: &dyn Fn(&str) -> Option<String>) -> Option<Told> {
    let service = service(variable);
    let told = |what: String, hint: String| Some((what, hint));
    let said = everything(error);
    let says = |words: &[&str]| words.iter().any(|word| said.contains(word));
    // The service of the host that lends keys to programs of a cloud; it is asked where nothing else is said.
    if says(&["169.254.169.254", "169.254.170."]) {
        return told("no credentials are named, and this host has none of a cloud".to_owned(), format!("set {KEYS}"));
    }
    match code(&said) {
        "NoSuchBucket" => return no_bucket(bucket, &service),
        "RequestTimeTooSkewed" => {
            return told(
                format!("this host's clock and that of {service} differ too much"),
                "set this host's clock, by NTP say: `date -u` shows it, and then run the same again".to_owned(),
            );
        }
        "InvalidAccessKeyId" => {
            return told(format!("{service} does not know the key in AWS_ACCESS_KEY_ID"), format!("set {KEYS}, of that service"));
        }
        "SignatureDoesNotMatch" => {
            return told(
                format!("{service} says that AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID"),
                "set both, of one pair".to_owned(),
            );
        }
        "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired" => {
            return told(format!("{service} does not take the lent credentials any more"), format!("lend new ones: {KEYS}"));
        }
        "AuthorizationHeaderMalformed" | "PermanentRedirect" | "IllegalLocationConstraintException" => {
            return told(
                format!("the bucket {bucket} is in another region"),
                "set AWS_REGION to the bucket's region, and AWS_ENDPOINT_URL to the service that has it".to_owned(),
            );
        }
        _ => {}
    }
    match error {
        StoreError::Unreachable { .. } if says(&["dns error", "failed to lookup address"]) => told(
            format!("cannot find the host of {service}"),
            format!("see whether AWS_ENDPOINT_URL (or AWS_REGION) names it rightly, and {AGAIN}"),
        ),
        StoreError::Unreachable { .. } if says(&["invalid peer certificate", "UnknownIssuer", "certificate"]) => told(
            format!("the certificate of {service} is not one that this host trusts"),
            "see whether AWS_ENDPOINT_URL names the service by a name of its certificate, whose authority this host has to know".to_owned(),
        ),
        StoreError::Unreachable { .. } if says(&["500 Internal", "502 Bad", "503 Service", "504 Gateway", "429 Too", "SlowDown"]) => {
            told(format!("{service} answers that it cannot serve now"), format!("wait, and {AGAIN}"))
        }
        StoreError::Unreachable { .. } if says(&["no answer in", "timed out", "Timeout"]) => {
            told(format!("{service} does not answer in time"), format!("see what keeps it, and {AGAIN}"))
        }
        StoreError::Unreachable { .. } => told(
            format!("cannot reach {service}"),
            format!("see whether AWS_ENDPOINT_URL (or AWS_REGION) names a service that answers from here, and {AGAIN}"),
        ),
        // Its leases end by themselves, unlike locks.
        StoreError::Busy { .. } => told(
            format!("others use the bucket {bucket}"),
            "try again, or wait longer: --wait 60s; a process that died is waited for up to 32 s".to_owned(),
        ),
        StoreError::ReadOnly(_) => {
            told(format!("writing to the bucket {bucket} is denied"), format!("use credentials that may write to it: {KEYS}"))
        }
        StoreError::Full(_) => told(
            format!("{service} has no more room for the bucket {bucket}"),
            "free some space or raise its quota; farbus bank gc removes what no machine needs".to_owned(),
        ),
        StoreError::Io { source, .. } => match source.kind() {
            ErrorKind::PermissionDenied => {
                told(format!("access to the bucket {bucket} is denied"), format!("name credentials that may read it: {KEYS}"))
            }
            ErrorKind::NotFound => no_bucket(bucket, &service),
            ErrorKind::AlreadyExists => told(
                format!("something is in the bucket {bucket} under this prefix"),
                "use the bank that is there as it is, or choose another prefix".to_owned(),
            ),
            ErrorKind::InvalidInput => told(
                "it is not said where the service is, or who asks".to_owned(),
                "set AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ALLOW_HTTP=true where an http:// service is wanted"
                    .to_owned(),
            ),
            _ => told(format!("{service} refuses a request"), "look at what it says, and at its own log".to_owned()),
        },
        _ => None,
    }
}

fn no_bucket(bucket: &str, service: &str) -> Option<Told> {
    Some((
        format!("there is no bucket {bucket} at {service}"),
        "make the bucket with the service's own tools, or name another".to_owned(),
    ))
}

/// Where requests go, as the crate that sends them finds it out.
fn service(variable: &dyn Fn(&str) -> Option<String>) -> String {
    let endpoint = variable("AWS_ENDPOINT_URL_S3").or_else(|| variable("AWS_ENDPOINT_URL")).or_else(|| variable("AWS_ENDPOINT"));
    let region = || variable("AWS_REGION").or_else(|| variable("AWS_DEFAULT_REGION")).unwrap_or_else(|| "us-east-1".to_owned());
    endpoint.unwrap_or_else(|| format!("S3 in {}", region()))
}

/// An error's text with those of its causes.
fn everything(error: &StoreError) -> String {
    let causes = std::iter::successors(Some(error as &dyn Error), |error| (*error).source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// What S3 calls an error: what stands in `<Code>` of its answer.
fn code(said: &str) -> &str {
    let behind = said.split_once("<Code>").and_then(|(_, behind)| behind.split_once("</Code>"));
    behind.map_or("", |(code, _)| code)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn said(error: &StoreError) -> Told {
        let variable = |name: &str| (name == "AWS_ENDPOINT_URL").then(|| "https://objects.example".to_owned());
        told_of(error, "backups", &variable).unwrap()
    }

    #[test]
    fn each_failure_names_the_service_or_the_bucket_and_what_to_do() {
        let unreachable = |text: &str| StoreError::Unreachable {
            what: "cannot read config bank".to_owned(),
            source: io::Error::other(text.to_owned()),
        };
        let io =
            |kind, text: &str| StoreError::Io { what: "cannot read".to_owned(), source: io::Error::new(kind, text.to_owned()) };
        let coded = |code: &str| io(ErrorKind::PermissionDenied, &format!("403 Forbidden: <Error><Code>{code}</Code></Error>"));
        for (error, what, hint) in [
            (unreachable("client error (Connect): tcp connect error"), "cannot reach https://objects.example", "AWS_ENDPOINT_URL"),
            (
                unreachable("dns error: failed to lookup address information"),
                "cannot find the host of https://objects.example",
                "rightly",
            ),
            (unreachable("invalid peer certificate: UnknownIssuer"), "certificate of https://objects.example", "authority"),
            (unreachable("503 Service Unavailable"), "cannot serve now", "wait"),
            (unreachable("no answer in 60s"), "does not answer in time", "again"),
            (io(ErrorKind::NotFound, "x"), "no bucket backups at https://objects.example", "make the bucket"),
            (coded("NoSuchBucket"), "no bucket backups at", "make the bucket"),
            (coded("RequestTimeTooSkewed"), "clock", "date -u"),
            (coded("InvalidAccessKeyId"), "does not know the key", "AWS_ACCESS_KEY_ID"),
            (coded("SignatureDoesNotMatch"), "AWS_SECRET_ACCESS_KEY does not belong", "one pair"),
            (coded("ExpiredToken"), "any more", "AWS_SESSION_TOKEN"),
            (coded("PermanentRedirect"), "another region", "AWS_REGION"),
            (coded("AccessDenied"), "access to the bucket backups is denied", "may read"),
            (StoreError::ReadOnly(io::Error::other("x")), "writing to the bucket backups is denied", "may write"),
            (StoreError::Full(io::Error::other("x")), "no more room", "gc"),
            (io(ErrorKind::InvalidInput, "x"), "not said where", "AWS_ALLOW_HTTP"),
            (
                io(ErrorKind::PermissionDenied, "PUT http://169.254.169.254/latest/api/token"),
                "no credentials",
                "set AWS_ACCESS_KEY_ID",
            ),
        ] {
            let told = said(&error);
            assert!(told.0.contains(what) && told.1.contains(hint), "{error}: {told:?}");
            assert!(!told.1.contains("verify"), "{told:?}");
        }
    }

    #[test]
    fn without_an_endpoint_the_service_is_that_of_the_region() {
        assert_eq!(service(&|name| (name == "AWS_REGION").then(|| "eu-central-1".to_owned())), "S3 in eu-central-1");
        assert_eq!(service(&|_| None), "S3 in us-east-1");
    }
}
