# An EKS cluster that runs deploy/kubernetes: terraform init && terraform apply, then kubectl apply -f deploy/kubernetes
terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

variable "region" {
  type    = string
  default = "eu-central-1"
}

variable "name" {
  type    = string
  default = "mmembed"
}

variable "instance_types" {
  type        = list(string)
  default     = ["c7i.2xlarge"]
  description = "c7i has avx512_bf16; use g6.xlarge and a CUDA image for --device cuda"
}

provider "aws" {
  region = var.region
}

data "aws_availability_zones" "all" {}

module "vpc" {
  source             = "terraform-aws-modules/vpc/aws"
  version            = "~> 5.0"
  name               = var.name
  cidr               = "10.0.0.0/16"
  azs                = slice(data.aws_availability_zones.all.names, 0, 2)
  private_subnets    = ["10.0.1.0/24", "10.0.2.0/24"]
  public_subnets     = ["10.0.101.0/24", "10.0.102.0/24"]
  enable_nat_gateway = true
  single_nat_gateway = true
}

module "eks" {
  source                                   = "terraform-aws-modules/eks/aws"
  version                                  = "~> 20.0"
  cluster_name                             = var.name
  cluster_version                          = "1.31"
  vpc_id                                   = module.vpc.vpc_id
  subnet_ids                               = module.vpc.private_subnets
  cluster_endpoint_public_access           = true
  enable_cluster_creator_admin_permissions = true
  eks_managed_node_groups = {
    serve = {
      instance_types = var.instance_types
      min_size       = 2
      max_size       = 10
      desired_size   = 2
    }
  }
}

output "configure_kubectl" {
  value = "aws eks update-kubeconfig --region ${var.region} --name ${var.name}"
}
