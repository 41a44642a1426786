//! Every certificate that is not good enough, on either side, over real connections: who is told what, and that the next one is served.
//!
//! A borrower whose certificate ran out an hour ago is named with that moment at the lender, and hears "it is not valid, by the peer's clock".
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod support;

use std::time::{Duration, SystemTime};

use farbus_control::certificate::{Moment, Untimely, Validity};
use farbus_control::{
    AllowList, BorrowerSecurity, CertificateProblem as Problem, Credentials, LenderSecurity, MeetError, Unwelcome,
};
use support::{Lender, Site, take, tls};

fn hours(from: i64, until: i64) -> Validity {
    let at = |hours: i64| {
        let distance = Duration::from_secs(hours.unsigned_abs() * 3600);
        Moment(if hours < 0 { SystemTime::now() - distance } else { SystemTime::now() + distance })
    };
    Validity { from: at(from), until: at(until) }
}

/// The certificate and key of one, and the authority of another.
fn trusting(own: &farbus_control::authority::Issued, authority: &Site) -> Credentials {
    Credentials::from_pem(own.certificate.as_bytes(), own.key.as_bytes(), authority.0.pem().as_bytes()).unwrap()
}

#[track_caller]
fn assert_lender_refuses(lender: &Lender, borrower: &BorrowerSecurity, hears: Unwelcome) -> Problem {
    let (at_lender, at_borrower) = lender.part(borrower);
    assert!(matches!(at_borrower, MeetError::Unwelcome(heard) if heard == hears), "{at_borrower}");
    let MeetError::Certificate(problem) = at_lender else { panic!("{at_lender}") };
    problem
}

#[track_caller]
fn assert_borrower_refuses(lender: &Lender, borrower: &BorrowerSecurity, hears: Unwelcome) -> Problem {
    let (at_lender, at_borrower) = lender.part(borrower);
    assert!(matches!(at_lender, MeetError::Unwelcome(heard) if heard == hears), "{at_lender}");
    let MeetError::Certificate(problem) = at_borrower else { panic!("{at_borrower}") };
    problem
}

#[test]
fn two_of_one_authority_meet_and_know_each_other() {
    let site = Site::new();
    let lender = site.lender();
    let (at_lender, at_borrower) = lender.meet(&site.vm7());
    assert_eq!(at_lender.unwrap().peer.unwrap().to_string(), "farbus:borrower/vm7");
    assert_eq!(at_borrower.unwrap().peer.unwrap().to_string(), "farbus:lender/nas");
    lender.assert_serves(&site.vm7());
}

#[test]
fn a_borrower_of_another_authority_is_refused_also_where_that_has_the_same_name() {
    let (site, other) = (Site::new(), Site::new());
    let lender = site.lender();
    // It would take the lender's.
    let stranger = tls(trusting(&other.issue("farbus:borrower/vm7", &[], Validity::days_from_now(1)), &site));
    let problem = assert_lender_refuses(&lender, &stranger, Unwelcome::UnknownAuthority);
    assert_eq!(problem, Problem::UnknownAuthority { issuer: "CN=lab".to_owned() });
    lender.assert_serves(&site.vm7());
}

#[test]
fn a_borrower_refuses_a_lender_of_another_authority() {
    let (site, other) = (Site::new(), Site::new());
    let lender = site.lender();
    let problem = assert_borrower_refuses(&lender, &other.vm7(), Unwelcome::UnknownAuthority);
    assert!(matches!(problem, Problem::UnknownAuthority { .. }), "{problem}");
    lender.assert_serves(&site.vm7());
}

#[test]
fn certificates_that_are_not_valid_now_are_refused_with_the_moment() {
    let site = Site::new();
    for (validity, early) in [(hours(-50, -1), false), (hours(1, 50), true)] {
        let is_it = |problem: &Problem| match problem {
            Problem::Untimely(Untimely::Expired { since }) => !early && since.to_string() == validity.until.to_string(),
            Problem::Untimely(Untimely::NotYetValid { from }) => early && from.to_string() == validity.from.to_string(),
            _ => false,
        };
        let lender = site.lender();
        let borrower = tls(take(&site.issue("farbus:borrower/vm7", &[], validity)));
        let problem = assert_lender_refuses(&lender, &borrower, Unwelcome::Untimely);
        assert!(is_it(&problem), "{problem}");
        lender.assert_serves(&site.vm7());

        let lender = Lender::tls(take(&site.issue("farbus:lender/nas", &["127.0.0.1"], validity)), &["vm7"]);
        let problem = assert_borrower_refuses(&lender, &site.vm7(), Unwelcome::Untimely);
        assert!(is_it(&problem), "{problem}");
    }
}

#[test]
fn a_certificate_of_the_other_role_is_refused() {
    let site = Site::new();
    let lender = site.lender();
    let second = tls(take(&site.issue("farbus:lender/vm7", &[], Validity::days_from_now(1))));
    let problem = assert_lender_refuses(&lender, &second, Unwelcome::Role);
    assert_eq!(problem.to_string(), "is one of a lender, not of a borrower");
    lender.assert_serves(&site.vm7());

    let impostor = Lender::tls(site.vm("nas"), &["vm7"]);
    let problem = assert_borrower_refuses(&impostor, &site.vm7(), Unwelcome::Role);
    assert_eq!(problem.to_string(), "is one of a borrower, not of a lender");
}

#[test]
fn a_borrower_that_is_not_on_the_list_is_refused_by_name() {
    let site = Site::new();
    let lender = site.lender();
    let problem = assert_lender_refuses(&lender, &tls(site.vm("vm8")), Unwelcome::NotAllowed);
    assert_eq!(problem, Problem::NotAllowed { name: "vm8".parse().unwrap() });
    lender.assert_serves(&site.vm7());
    let nobody = Lender::tls(site.nas(), &[]);
    assert_lender_refuses(&nobody, &site.vm7(), Unwelcome::NotAllowed);
    Lender::tls(site.nas(), &["*"]).assert_serves(&tls(site.vm("vm8")));
}

#[test]
fn a_list_in_a_file_holds_for_the_next_borrower() {
    let site = Site::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("allowed");
    std::fs::write(&path, "vm7\n").unwrap();
    let mut allow = AllowList::default();
    allow.add_file(&path).unwrap();
    let lender = Lender::new(LenderSecurity::Tls { credentials: site.nas(), allow });
    lender.assert_serves(&site.vm7());
    std::fs::write(&path, "vm8\n").unwrap();
    assert_lender_refuses(&lender, &site.vm7(), Unwelcome::NotAllowed);
    lender.assert_serves(&tls(site.vm("vm8")));
    std::fs::remove_file(&path).unwrap();
    let problem = assert_lender_refuses(&lender, &tls(site.vm("vm8")), Unwelcome::NotAllowed);
    assert!(matches!(&problem, Problem::NoList { .. }), "{problem}");
}

#[test]
fn a_lender_of_another_host_is_refused_unless_it_is_wanted_by_name() {
    let site = Site::new();
    let elsewhere = take(&site.issue("farbus:lender/nas", &["nas.example.org", "10.0.0.7"], Validity::days_from_now(1)));
    let lender = Lender::tls(elsewhere, &["vm7"]);
    let problem = assert_borrower_refuses(&lender, &site.vm7(), Unwelcome::Bad);
    assert_eq!(problem.to_string(), "is not for 127.0.0.1, but for nas, nas.example.org, 10.0.0.7");
    let wanting = |name: &str| BorrowerSecurity::Tls { credentials: site.vm("vm7"), peer: Some(name.parse().unwrap()) };
    let problem = assert_borrower_refuses(&lender, &wanting("other"), Unwelcome::NotAllowed);
    assert_eq!(problem, Problem::OtherPeer { expected: "other".parse().unwrap(), found: "nas".parse().unwrap() });
    lender.assert_serves(&wanting("nas"));
}
