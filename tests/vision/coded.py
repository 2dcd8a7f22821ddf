"""Files that nothing in the test environment can write: made once from generated pictures, by cjpeg and pillow-heif."""
import base64

import torch


def coded(text): return torch.frombuffer(bytearray(base64.b85decode(text)), dtype=torch.uint8)


# cjpeg -arithmetic -quality 60, of `picture(24, 16)`; then with -progressive
ARITHMETIC = coded(
    '|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU`kO^PygEhLje'
    'vB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2J01*fP5C9kh0U`hb5di}c0sqVZ3IGrg1pyEd1'
    '^?Or3<CiG0ucid06zf#0C)+|zpQHIDEQ1xcdF*@^!CNM$&(!fOSfeEIz8>`)%*viU?4qe3#q{_Fx-U9j*sLMz0rTKdw%{8KU~V|aC&79&vi7y#FMXZ(!F%'
    'LQ%~LFY>G<xX@$hJ^D;nS(d6)cl4P;||Je'
)
ARITHMETIC_PROGRESSIVE = coded(
    '|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU`kO^PygEhLje'
    'vB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2K01*fP5C9kh0U`hb5di}c0sqVZ1^^HN5dYc$3'
    '<CiG0uTcb00060@WQNA>x}&9t1je_|I7dc5C#9*00;pA009L86A$(xp#RJO1Q7-Q+5iXv0|5a)0ToT>Zs%bC%m4%t1^?Or2mt~C0Y3pf)iz#q00000mSTn'
    'f%m4%s1^?Or2mt{A20sGVyomqI00a;P|Jncu0RaF3KOr?mYdg$kX4N~AT3Q!ar7-{601N{G00IC50000G<Iw-i00a>Q|Jncu0RsU6KM>r6<t_ir00a>Q|J'
    'ncu0RjO5KM)Rznd4mDQ3`G{6B086VchJP|I7dc5C#9*00;pA00BP`tY4Zs1q-KxLPoj08xn*|<Y6l=yxJ-CiZx*W*#'
)

# pillow-heif, quality 50, of `picture(64, 48)` blurred by a Gaussian of radius 2; with its gray picture as alpha; and
# with
# a second picture, turned by 180 degrees
HEIC = coded(
    '0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0004fZDn*}000000000XXk=`10000000000aA{+700000000000000000000B57=IV*mgE07O6l0RRC2000'
    '01p#T8@0000000AQa001LtX>Mi!000000RR916=`l}WdZ;I000310BCk&F#rGn01j|zbZr0t000010002}X>f9I0002pX>en20001XXm(>m0RwOV0058x0'
    '00009`FGC{rLC*01pFT0096PKmiN^|NjGU00093kN^M!000939=ZZRVE_RDDnbDP18@KU0|1Z!00RI30{|YNAb|yz>g1-mxCm%4AOHXZ10VnZ0{|gn0096'
    '7L;=Bbz=;3=025<xY;ta6Y<K_x01W^JfB*mh6lrsCWdHyG00000KmY&$KmY&$C}V74Z~y=RKmY&$0RR91FaQ7m0RR91000000{{R2@Bjb+0ssI25O8UDX#'
    'fBK00RgJ2mk;87-?{AVE_OC000000RRC7fdT^sga7~mD{W+9bN~PWA1DE@6M*$GX1DY?r<f>i$gEVkg9j&Fj!2c<3|Q&D;Bn|g=n)*}cft1Iy55wNWv9)`'
    'RqLSQqCAaWi5`^mRpcqqMo5j`deB{i6flZ=53a)4>y4;;s>w~@27ADFU^t08i>48k=SD-;2U^RPM_O44G=j$c_eg$C-4{<iRrgA0s~v=V-pEEkbLBuE@?6'
    '`W&h{(ZtXKC58j5#J1wX~wScc7)?-PZ;gCGknZQ-8n>RZkr4<adlcgC6Z>L0G{<VE3Wx$aN1)cn-6v%m3sK=@vAmV>`gA4R=HUy=OY!xb&E<YtMXH@%D67'
    '-|N!g)-XA+6VYmb!D_>J=#jQ6cqO7Nym8RvGgao3zkGYQG^#XaV?uvHp-Wi'
)
HEIC_ALPHA = coded(
    '0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<0007OZDn*}000000000XXk=`10000000000aA{+700000000000000000000G-+&aV*mgE07O6l0ssL3000'
    '02j{pGx0000000AQa0ssI200XiB0RR9100000cmMzZIB98aW&i*H00062000$fZf0cy000000RRAKc4ILB0000LX>Mj^0ssI200IC2Xm(>U000004sdC7Z'
    '2$lO0003100F9LaB^?}00Dw&aAR)(004Gqc4I>U18@KU0FVFx0000U@BsY%`1k+-4+CHT0RR|40Sp2E{{wIU00RJ!0009300RIXx&lC90096hLID8-Z~y='
    'U0FVFx0{{R603M(qfd!W8<fgf}2xu@M00096AOHXZ03l)k0RRR>0l{;?i2wiq6Ju{|a&BX6cmM$a4FCp!0000KX>)L8000000000$0000$0000eV{Bn?00'
    '00$000010000m000010000000002|NsB+000020000GaA|mH000000|*ER0001RXm(>m0R#vD005u(000009`FGC{P_3)01pFT0096OKmiN^|NjIC00093'
    'pZEX(0{{RXx&lC90096cLID8;2mk;B0H62(00RI39>9VG7F(;5n&!ZO000bt00093gkk^z00u+>!E?Zg0000EaA|mH000000SEv904HH}ctZdH004DzZaQ'
    'snWoJ5QWp-maGB7bUI$?EqX=FMv00000AZc)IVE_OC000000ssL8fdT^sga85sh64wPga7~l8fkK6W&i*H000004q<h8YybiP0RRC200E<IWMOmw00AE;0'
    'k0E)^)Y6*^f{-PC~nBCRJnr(CtZ$6mD~(i>Av7`=tSrd9Orkz_TjqTl#^wr&B|5lpyHxDjb4c!l=D^ODbPkpjoy0DU4s-bihB>P!r1GLsC%l(P2dK5z;|F'
    'ci93s?5tZjgL)Hgc%a%u4SqU_P#{Kt5eofsMPd!!lN@%McgnZt}MnH4rKp*m4+n>(%E8MJC_X!$`cT5F8#oAbg&6n>Jg};L!3oUKop6%*e&L9sWDSvmynf'
    '2-)uI=PS;c2<<PqWng)U>m|@q0k{UUHU$zfd1Vy+mJ;{NBSAEwbchiJ>>Wi`p1!2DODU+RWMq_*Hdfv}QfpO1Bgg_UB2*c;>P6C%FrjL_AT17c_A#n^ZQ+'
    'my-Yh0CXq;t|#b{t*hsI%zAK3_^eeO=LaWUj#K`9Ll?@AF(2%eoQKMOsa>p%W9a3y5ihnYsbi30SeT=_nkA>bt>^GCOckuV%tAL~MyItG3L-Ja)#l%pM_5'
    '0;Y8mIQ>?jnaKnk+mqUe0w;P68Lpeg=;QZf'
)
HEIC_TWO = coded(
    '0000SW^{RQXk}?*00000ZE0pPXk}?*ZE0a<00053ZDn*}000000000XXk=`10000000000aA{+700000000000000000000G-+&aV*mgE07O6l0ssL3000'
    '01&;S7d0000000AQa0ssI200Q#>0RR9100001DgXcgIB98aW&i*H00062000$fZf0cy000000RRAKc4ILB0000LX>Mj^0ssI200IC2Xm(>U000004sdC7Z'
    '2$lO00031009MQaB^?}007--aAR)(004Gqc4I>U18@KU0FVFx0000U@BsY%`1k+-4+CHT0RR|40Sp2E{{wIU00RJ!0009300RIXx&lC90096hLID8-Z~y='
    'U0FVFx0{{R603M(qfd!W8<fgf}2xu@M00096AOHXZ03l)k0RRR>0l{;?i2wiq6Ju{|a&BX6cmM$a4FCp!0000KX>)L8000000000$0000$0000eV{Bn?00'
    '00$000010000m000010000000002|NsB+000020000GaA|mH000000|*ER0000WX>e^}0000000002009Mo0s{qv00ISp0s{qv00072ZDe6|0003WC;_h%'
    'fb}tExAZxum?&<@tW>#!2Pa*QNR`|SSn0mtap*+o5gg}t!S><0-jtJNr_IV$>!9MIJdIw79+dM{<SEcbNR8fl&|QNRFp7H*uEN;sji`I7$xYw}d%$;KIEg'
    '!prV*9rMnl#ITFaJ4T3HD+g2w&#NPbP-7f(G^_eyB19fW+|$VNbO<v<_uT-%?{_AA`1SN91Tig!!}KgHTuhRv7n6NSHnAPX&R;hyd4Th1U4A}N1&#+mi%A'
    'Fl1>Md4|=?oYGS{M59wzwvuO_+E0BgTGK8MZH8{k^J7n6)m#lW{IIUy^GoyY6i81GTO}A2l!QWWwd5J+Df++6!zyy$9U$k^e4FsmP9;Jgcme%Et^y}%9oP'
    '>00AZ_0k0E)^)YBy>NE47iU;MU>+4x`jgn2?PhWL`=$Y-ZENc8A&bIT8HZSE(lNDm)&VMRl+`Y^HSY7XDWL*tD?RSQUqsu0!XPpQ$6v(s)@5<vz@Uy2;+n'
    'u0Y@XcjjTyF&d{)j3BPU-v?aGwHK{EuFMuk4=5M1ZBRx{g59y=ZEz^;CdF9X}llsgU7mB()Lu53ZH>V<j214jTzs##IKMhW?#s%@DLpqWXqaOty6iTW&{;'
    '!W#RQmDmuwiAZ|uW|>>Ih|~9EL20P!ozL8k+QVgYstOg&yI@54EHi*Qpx|M}$}<0E&c`B?IsJ)2uH-uR9tchr|1Xn&`Be96;g;aEyH=3^3lYm3Si96@B!e'
    'FkWuR%Aa`;HBr?nvFcm'
)
