//! Our bindings to libibverbs against those of rdma-sys, whose unions are written by hand: size, alignment, offsets and numbers.
//!
//! Where ours had `lkey` before `length` in `ibv_sge`, the complaint would read "ibv_sge.lkey: at 8 with 4 bytes, rdma-sys has it at 12 with 4". What sys.rs has
//! and this list has not is a complaint too.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::collections::BTreeSet;
use std::mem::offset_of;

use rdma_sys as theirs;

#[path = "../../../transport/src/verbs/sys.rs"]
mod sys;

/// Complaints, and all names that were compared: `ibv_sge`, `ibv_sge.lkey`, `IBV_WC_SUCCESS`.
#[derive(Default)]
struct Judge {
    complaints: Vec<String>,
    compared: BTreeSet<String>,
}

impl Judge {
    fn types(&mut self, name: &str, ours: (usize, usize), theirs: (usize, usize)) {
        self.compared.insert(name.to_owned());
        if ours != theirs {
            let ((size, align), (their_size, their_align)) = (ours, theirs);
            self.complaints
                .push(format!("{name}: {size} bytes aligned to {align}, rdma-sys has {their_size} aligned to {their_align}"));
        }
    }

    fn fields(&mut self, name: &str, field: &str, ours: (usize, usize), theirs: (usize, usize)) {
        self.compared.insert(format!("{name}.{field}"));
        if ours != theirs {
            let ((at, len), (their_at, their_len)) = (ours, theirs);
            self.complaints
                .push(format!("{name}.{field}: at {at} with {len} bytes, rdma-sys has it at {their_at} with {their_len}"));
        }
    }

    fn numbers(&mut self, name: &str, ours: u64, theirs: u64) {
        self.compared.insert(name.to_owned());
        if ours != theirs {
            self.complaints.push(format!("{name}: {ours}, rdma-sys has {theirs}"));
        }
    }
}

/// Bytes of the field that the closure names.
fn field_size<T, F>(_: impl Fn(&T) -> &F) -> usize {
    size_of::<F>()
}

/// Bytes of the union's member that the closure fills.
fn member_size<U, F>(_: impl Fn(F) -> U) -> usize {
    size_of::<F>()
}

/// Compares one type. The patterns do not compile where a struct of either side has a field that is not named here.
macro_rules! compare {
    ($judge:ident, struct $ours:path = $theirs:path { $($field:ident)* } $(renamed { $($our_field:ident = $their_field:ident)* })?) => {{
        use {$ours as Ours, $theirs as Theirs};
        let name = stringify!($ours).rsplit(':').next().unwrap().trim();
        let _ = |all: Ours| { let Ours { $($field: _,)* $($($our_field: _,)*)? } = all; };
        let _ = |all: Theirs| { let Theirs { $($field: _,)* $($($their_field: _,)*)? } = all; };
        $judge.types(name, (size_of::<Ours>(), align_of::<Ours>()), (size_of::<Theirs>(), align_of::<Theirs>()));
        $($judge.fields(
            name,
            stringify!($field),
            (offset_of!(Ours, $field), field_size(|it: &Ours| &it.$field)),
            (offset_of!(Theirs, $field), field_size(|it: &Theirs| &it.$field)),
        );)*
        $($($judge.fields(
            name,
            stringify!($our_field),
            (offset_of!(Ours, $our_field), field_size(|it: &Ours| &it.$our_field)),
            (offset_of!(Theirs, $their_field), field_size(|it: &Theirs| &it.$their_field)),
        );)*)?
    }};
    ($judge:ident, union $ours:path = $theirs:path { $($our_field:ident = $their_field:ident)* }) => {{
        use {$ours as Ours, $theirs as Theirs};
        let name = stringify!($ours).rsplit(':').next().unwrap().trim();
        $judge.types(name, (size_of::<Ours>(), align_of::<Ours>()), (size_of::<Theirs>(), align_of::<Theirs>()));
        $($judge.fields(
            name,
            stringify!($our_field),
            (offset_of!(Ours, $our_field), member_size(|it| Ours { $our_field: it })),
            (offset_of!(Theirs, $their_field), member_size(|it| Theirs { $their_field: it })),
        );)*
    }};
    ($judge:ident, opaque $($name:ident)*) => {{
        $($judge.types(
            stringify!($name),
            (size_of::<sys::$name>(), align_of::<sys::$name>()),
            (size_of::<theirs::$name>(), align_of::<theirs::$name>()),
        );)*
    }};
    // rdma-sys has enumerations in four styles.
    ($judge:ident, constants $($name:ident)*) => { $($judge.numbers(stringify!($name), sys::$name.into(), theirs::$name.into());)* };
    ($judge:ident, module $of:ident $($name:ident)*) => {
        $($judge.numbers(stringify!($name), sys::$name.into(), theirs::$of::$name.into());)*
    };
    ($judge:ident, bits $of:ident $($name:ident)*) => {
        $($judge.numbers(stringify!($name), sys::$name.into(), theirs::$of::$name.0.into());)*
    };
    ($judge:ident, variants $of:ident $($name:ident)*) => {
        $($judge.numbers(stringify!($name), sys::$name.into(), theirs::$of::$name as u64);)*
    };
}

fn structs(judge: &mut Judge) {
    compare!(judge, struct sys::ibv_sge = theirs::ibv_sge { addr length lkey });
    compare!(judge, struct sys::ibv_recv_wr = theirs::ibv_recv_wr { wr_id next sg_list num_sge });
    compare!(judge, struct sys::ibv_send_wr = theirs::ibv_send_wr {
        wr_id next sg_list num_sge opcode send_flags wr qp_type
    } renamed { __bindgen_anon_1 = imm_data_invalidated_rkey_union __bindgen_anon_2 = bind_mw_tso_union });
    compare!(judge, struct sys::ibv_send_wr__bindgen_ty_2__bindgen_ty_1 = theirs::rdma_t { remote_addr rkey });
    compare!(judge, struct sys::ibv_send_wr__bindgen_ty_2__bindgen_ty_2 = theirs::atomic_t { remote_addr compare_add swap rkey });
    compare!(judge, struct sys::ibv_send_wr__bindgen_ty_2__bindgen_ty_3 = theirs::ud_t { ah remote_qpn remote_qkey });
    compare!(judge, struct sys::ibv_send_wr__bindgen_ty_3__bindgen_ty_1 = theirs::xrc_t { remote_srqn });
    compare!(judge, struct sys::ibv_send_wr__bindgen_ty_4__bindgen_ty_1 = theirs::bind_mw_t { mw rkey bind_info });
    compare!(judge, struct sys::ibv_send_wr__bindgen_ty_4__bindgen_ty_2 = theirs::tso_t { hdr hdr_sz mss });
    compare!(judge, struct sys::ibv_mw_bind_info = theirs::ibv_mw_bind_info { mr addr length mw_access_flags });
    compare!(judge, struct sys::ibv_wc = theirs::ibv_wc {
        wr_id status opcode vendor_err byte_len qp_num src_qp wc_flags pkey_index slid sl dlid_path_bits
    } renamed { __bindgen_anon_1 = imm_data_invalidated_rkey_union });
    compare!(judge, struct sys::ibv_gid__bindgen_ty_1 = theirs::ibv_gid_global_t { subnet_prefix interface_id });
    compare!(judge, struct sys::ibv_gid_entry = theirs::ibv_gid_entry { gid gid_index port_num gid_type ndev_ifindex });
    compare!(judge, struct sys::ibv_global_route = theirs::ibv_global_route { dgid flow_label sgid_index hop_limit traffic_class });
    compare!(judge, struct sys::ibv_ah_attr = theirs::ibv_ah_attr { grh dlid sl src_path_bits static_rate is_global port_num });
    compare!(judge, struct sys::ibv_qp_cap = theirs::ibv_qp_cap {
        max_send_wr max_recv_wr max_send_sge max_recv_sge max_inline_data
    });
    compare!(judge, struct sys::ibv_qp_init_attr = theirs::ibv_qp_init_attr {
        qp_context send_cq recv_cq srq cap qp_type sq_sig_all
    });
    compare!(judge, struct sys::ibv_qp_attr = theirs::ibv_qp_attr {
        qp_state cur_qp_state path_mtu path_mig_state qkey rq_psn sq_psn dest_qp_num qp_access_flags cap ah_attr alt_ah_attr pkey_index
        alt_pkey_index en_sqd_async_notify sq_draining max_rd_atomic max_dest_rd_atomic min_rnr_timer port_num timeout retry_cnt rnr_retry
        alt_port_num alt_timeout rate_limit
    });
    compare!(judge, struct sys::ibv_device_attr = theirs::ibv_device_attr {
        fw_ver node_guid sys_image_guid max_mr_size page_size_cap vendor_id vendor_part_id hw_ver max_qp max_qp_wr device_cap_flags max_sge
        max_sge_rd max_cq max_cqe max_mr max_pd max_qp_rd_atom max_ee_rd_atom max_res_rd_atom max_qp_init_rd_atom max_ee_init_rd_atom
        atomic_cap max_ee max_rdd max_mw max_raw_ipv6_qp max_raw_ethy_qp max_mcast_grp max_mcast_qp_attach max_total_mcast_qp_attach max_ah
        max_fmr max_map_per_fmr max_srq max_srq_wr max_srq_sge max_pkeys local_ca_ack_delay phys_port_cnt
    });
    compare!(judge, struct sys::ibv_port_attr = theirs::ibv_port_attr {
        state max_mtu active_mtu gid_tbl_len port_cap_flags max_msg_sz bad_pkey_cntr qkey_viol_cntr pkey_tbl_len lid sm_lid lmc max_vl_num
        sm_sl subnet_timeout init_type_reply active_width active_speed phys_state link_layer flags port_cap_flags2
    });
    compare!(judge, struct sys::ibv_async_event = theirs::ibv_async_event { element event_type });
    compare!(judge, struct sys::ibv_mr = theirs::ibv_mr { context pd addr length handle lkey rkey });
    compare!(judge, struct sys::ibv_mw = theirs::ibv_mw { context pd rkey handle type_ });
    compare!(judge, struct sys::ibv_qp = theirs::ibv_qp {
        context qp_context pd send_cq recv_cq srq handle qp_num state qp_type mutex cond events_completed
    });
    compare!(judge, struct sys::ibv_comp_channel = theirs::ibv_comp_channel { context fd refcnt });
    compare!(judge, struct sys::ibv_context = theirs::ibv_context {
        device ops cmd_fd async_fd num_comp_vectors mutex abi_compat
    });
    compare!(judge, struct sys::ibv_context_ops = theirs::ibv_context_ops {
        _compat_query_device _compat_query_port _compat_alloc_pd _compat_dealloc_pd _compat_reg_mr _compat_rereg_mr _compat_dereg_mr
        alloc_mw bind_mw dealloc_mw _compat_create_cq poll_cq req_notify_cq _compat_cq_event _compat_resize_cq _compat_destroy_cq
        _compat_create_srq _compat_modify_srq _compat_query_srq _compat_destroy_srq post_srq_recv _compat_create_qp _compat_query_qp
        _compat_modify_qp _compat_destroy_qp post_send post_recv _compat_create_ah _compat_destroy_ah _compat_attach_mcast
        _compat_detach_mcast _compat_async_event
    });
}

fn unions(judge: &mut Judge) {
    compare!(judge, union sys::ibv_gid = theirs::ibv_gid { raw = raw global = global });
    compare!(judge, union sys::ibv_wc__bindgen_ty_1 = theirs::imm_data_invalidated_rkey_union_t {
        imm_data = imm_data invalidated_rkey = invalidated_rkey
    });
    compare!(judge, union sys::ibv_send_wr__bindgen_ty_1 = theirs::imm_data_invalidated_rkey_union_t {
        imm_data = imm_data invalidate_rkey = invalidated_rkey
    });
    compare!(judge, union sys::ibv_send_wr__bindgen_ty_2 = theirs::wr_t { rdma = rdma atomic = atomic ud = ud });
    compare!(judge, union sys::ibv_send_wr__bindgen_ty_3 = theirs::qp_type_t { xrc = xrc });
    compare!(judge, union sys::ibv_send_wr__bindgen_ty_4 = theirs::bind_mw_tso_union_t { bind_mw = bind_mw tso = tso });
    compare!(judge, union sys::ibv_async_event__bindgen_ty_1 = theirs::ibv_async_event_element_t {
        cq = cq qp = qp srq = srq wq = wq port_num = port_num
    });
}

fn numbers(judge: &mut Judge) {
    compare!(judge, constants IBV_GID_TYPE_IB IBV_GID_TYPE_ROCE_V2);
    compare!(judge, bits ibv_device_cap_flags IBV_DEVICE_MEM_WINDOW_TYPE_2B);
    compare!(judge, bits ibv_access_flags IBV_ACCESS_LOCAL_WRITE IBV_ACCESS_REMOTE_WRITE IBV_ACCESS_REMOTE_READ IBV_ACCESS_MW_BIND);
    compare!(judge, bits ibv_send_flags IBV_SEND_SIGNALED IBV_SEND_INLINE);
    compare!(judge, bits ibv_qp_attr_mask
        IBV_QP_STATE IBV_QP_ACCESS_FLAGS IBV_QP_PKEY_INDEX IBV_QP_PORT IBV_QP_AV IBV_QP_PATH_MTU IBV_QP_TIMEOUT IBV_QP_RETRY_CNT
        IBV_QP_RNR_RETRY IBV_QP_RQ_PSN IBV_QP_MAX_QP_RD_ATOMIC IBV_QP_MIN_RNR_TIMER IBV_QP_SQ_PSN IBV_QP_MAX_DEST_RD_ATOMIC
        IBV_QP_DEST_QPN);
    compare!(judge, module ibv_mw_type IBV_MW_TYPE_2);
    compare!(judge, module ibv_port_state IBV_PORT_ACTIVE);
    compare!(judge, module ibv_qp_state IBV_QPS_INIT IBV_QPS_RTR IBV_QPS_RTS);
    compare!(judge, module ibv_qp_type IBV_QPT_RC);
    compare!(judge, module ibv_wc_opcode IBV_WC_RECV_RDMA_WITH_IMM);
    compare!(judge, module ibv_wc_status
        IBV_WC_SUCCESS IBV_WC_LOC_PROT_ERR IBV_WC_WR_FLUSH_ERR IBV_WC_REM_INV_REQ_ERR IBV_WC_REM_ACCESS_ERR IBV_WC_REM_OP_ERR IBV_WC_RETRY_EXC_ERR
        IBV_WC_RNR_RETRY_EXC_ERR);
    compare!(judge, module ibv_wr_opcode IBV_WR_RDMA_WRITE IBV_WR_RDMA_WRITE_WITH_IMM IBV_WR_SEND IBV_WR_RDMA_READ IBV_WR_LOCAL_INV IBV_WR_BIND_MW);
    compare!(judge, variants ibv_event_type
        IBV_EVENT_CQ_ERR IBV_EVENT_QP_FATAL IBV_EVENT_QP_REQ_ERR IBV_EVENT_QP_ACCESS_ERR IBV_EVENT_DEVICE_FATAL IBV_EVENT_PORT_ACTIVE
        IBV_EVENT_PORT_ERR);
}

/// What sys.rs defines, named as [`Judge::compared`] names it. Aliases of integers have no layout of their own, opaque structs no fields.
fn defined(source: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut inside = String::new();
    for line in source.lines() {
        let name = |after: &str| after.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next().unwrap().to_owned();
        if let Some(after) = line.strip_prefix("pub struct ").or_else(|| line.strip_prefix("pub union ")) {
            inside = name(after);
            names.insert(inside.clone());
        } else if let Some(after) = line.strip_prefix("pub const ") {
            names.insert(name(after));
        } else if let Some(after) = line.strip_prefix("    pub ")
            && !after.starts_with("_bindgen_opaque_blob")
        {
            names.insert(format!("{inside}.{}", name(after)));
        }
    }
    names
}

#[test]
fn every_struct_field_and_number_of_our_bindings_is_that_of_rdma_sys() {
    let mut judge = Judge::default();
    structs(&mut judge);
    unions(&mut judge);
    numbers(&mut judge);
    compare!(judge, opaque ibv_ah ibv_cq ibv_device ibv_mw_bind ibv_pd ibv_srq ibv_wq _compat_ibv_port_attr);
    let defined = defined(&std::fs::read_to_string(farbus_oracle::bindings_path()).unwrap());
    for name in defined.symmetric_difference(&judge.compared) {
        judge
            .complaints
            .push(format!("{name}: in sys.rs but not in the lists of tests/oracle/tests/layout.rs, or the other way round"));
    }
    assert!(judge.complaints.is_empty(), "{} complaints:\n{}", judge.complaints.len(), judge.complaints.join("\n"));
    assert!(judge.compared.len() > 300, "only {} names were compared", judge.compared.len());
    println!("{} structs, unions, fields and numbers are those of rdma-sys", judge.compared.len());
}

/// The twin: bindings that are wrong in one place each.
mod wrong {
    #![expect(non_camel_case_types, reason = "named as what they are held against")]

    #[repr(C)]
    pub(super) struct ibv_sge {
        pub(super) addr: u64,
        pub(super) lkey: u32,
        pub(super) length: u32,
    }

    #[repr(C)]
    pub(super) struct ibv_comp_channel {
        pub(super) context: *mut super::sys::ibv_context,
        pub(super) fd: i16,
        pub(super) refcnt: i32,
    }

    pub(super) union ibv_gid {
        pub(super) raw: [u8; 17],
        pub(super) global: [u64; 2],
    }
}

#[test]
fn what_is_wrong_is_named() {
    let mut judge = Judge::default();
    compare!(judge, struct wrong::ibv_sge = theirs::ibv_sge { addr length lkey });
    compare!(judge, struct wrong::ibv_comp_channel = theirs::ibv_comp_channel { context fd refcnt });
    compare!(judge, union wrong::ibv_gid = theirs::ibv_gid { raw = raw global = global });
    judge.numbers("IBV_WR_SEND", 3, theirs::ibv_wr_opcode::IBV_WR_SEND.into());
    assert_eq!(
        judge.complaints,
        [
            "ibv_sge.length: at 12 with 4 bytes, rdma-sys has it at 8 with 4",
            "ibv_sge.lkey: at 8 with 4 bytes, rdma-sys has it at 12 with 4",
            "ibv_comp_channel.fd: at 8 with 2 bytes, rdma-sys has it at 8 with 4",
            "ibv_gid: 24 bytes aligned to 8, rdma-sys has 16 aligned to 8",
            "ibv_gid.raw: at 0 with 17 bytes, rdma-sys has it at 0 with 16",
            "IBV_WR_SEND: 3, rdma-sys has 2",
        ]
    );
}

#[test]
fn what_sys_rs_defines_is_found() {
    let source = "pub const A: b = 1;\npub type b = u32;\npub struct c {\n    pub d: b,\n    pub e: Option<\n        fn(f: b),\n    >,\n}\n\
        pub union g {\n    pub h: u8,\n}\npub struct i {\n    pub _bindgen_opaque_blob: [u64; 2usize],\n}\n";
    assert_eq!(defined(source), ["A", "c", "c.d", "c.e", "g", "g.h", "i"].map(str::to_owned).into());
}
