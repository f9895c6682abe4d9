use tonic::Code;
use tonic_types::StatusExt;

use crate::loyalty::{Loyalty, created};

#[tokio::test]
async fn a_request_without_a_valid_customer_is_refused_and_names_the_field() {
    let loyalty = Loyalty::serve(&[]).await;
    for customer_id in ["", "ann b", "an\0n", &"x".repeat(65)] {
        let refused = loyalty.balance(customer_id).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        let details = refused.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.domain.as_str(), info.reason.as_str()), ("loyalty-service", "INVALID_CUSTOMER"));
        let fields: Vec<&str> =
            details.bad_request().unwrap().field_violations.iter().map(|bad| bad.field.as_str()).collect();
        assert_eq!(fields, ["customer_id"]);
    }
    assert_eq!(loyalty.balance(&"x".repeat(64)).await.unwrap(), (0, 0), "a customer without orders has no points");
    loyalty.stop().await;
}

#[tokio::test]
async fn a_sum_that_no_answer_can_hold_is_cut() {
    let loyalty = Loyalty::serve(&[]).await;
    let most = i64::MAX / 100;
    for orders in 1..=101 {
        assert_eq!(loyalty.deliver([&created("ann", i64::MAX)]).await.unwrap(), ["APPLIED"]);
        assert_eq!(loyalty.balance("ann").await.unwrap(), (most.saturating_mul(orders), orders));
    }
    loyalty.stop().await;
}
